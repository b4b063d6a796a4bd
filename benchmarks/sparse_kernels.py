"""The sparse kernels against dense and torch's own, on a grid of layers.

    python benchmarks/kernels.py --cases must --out kernels.json      # the rows of issue 5, on a GPU
    python benchmarks/kernels.py --cases grid --out kernels.json
    python benchmarks/kernels.py --cases cpu --out kernels_cpu.json   # one core

Progress goes to stderr; prints one JSON line, and writes all records to --out.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from raysearch.kernels import benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=["must", "grid", "cpu", "model"], default="must")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cpu" if options.cases == "cpu" else "cuda")

    def echo(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = {"benchmark": "kernels", "cases": options.cases}
    if options.cases == "model":
        found |= benchmark.header(device, torch.bfloat16) | benchmark.whole_model(device)
    elif options.cases == "cpu":
        torch.set_num_threads(1)
        records = []
        for case in benchmark.CPU:
            dtype = torch.float32 if case.block == 1 else torch.bfloat16
            records += benchmark.run_grid([case], device, dtype, echo)
        found |= benchmark.header(device, torch.float32) | {"records": records}
    else:
        cases = benchmark.MUST if options.cases == "must" else benchmark.GRID
        records = benchmark.run_grid(cases, device, torch.bfloat16, echo)
        found |= benchmark.header(device, torch.bfloat16) | {"records": records}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    if "records" in found:
        ratios = [record["dispatched_ratio"] for record in found.pop("records")]
        wins = [ratio for ratio in ratios if ratio != 1]
        found |= {"num_cells": len(ratios), "num_sparse": len(wins), "worst_dispatched_ratio": min(ratios),
                  "geometric_mean_of_sparse": math.exp(sum(map(math.log, wins)) / len(wins)) if wins else None}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
