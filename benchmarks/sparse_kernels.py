"""The sparse kernels against dense and torch's own, on a grid of layers.

    python benchmarks/sparse_kernels.py --cases must --out kernels.json      # the rows of issue 5, on a GPU
    python benchmarks/sparse_kernels.py --cases grid --out kernels.json
    python benchmarks/sparse_kernels.py --cases cpu --out kernels_cpu.json   # one core

Progress goes to stderr; prints one JSON line, and writes all records to --out.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from raysearch import kernel_benchmark as benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=["must", "grid", "cpu", "model"], default="must")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cpu" if options.cases == "cpu" else "cuda")

    def echo(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if options.cases == "cpu":
        torch.set_num_threads(1)  # before the header, which tells it
    summary = {"benchmark": "kernels", "cases": options.cases, **benchmark.header(device)}
    if options.cases == "model":
        summary |= benchmark.whole_model(device)
    else:
        cases = {"must": benchmark.MUST, "grid": benchmark.GRID, "cpu": benchmark.CPU}[options.cases]
        records: list[dict[str, object]] = []
        for case in cases:
            records += benchmark.run_grid([case], device, echo)
            summary["records"] = records
            if options.out:  # after every case, for a run that is cut off
                options.out.write_text(json.dumps(summary, indent=1))
    if options.out:
        options.out.write_text(json.dumps(summary, indent=1))
    if "records" in summary:
        ratios = [record["dispatched_ratio"] for record in summary.pop("records")]
        wins = [ratio for ratio in ratios if ratio != 1]
        summary |= {"num_cells": len(ratios), "num_sparse": len(wins), "worst_dispatched_ratio": min(ratios),
                    "geometric_mean_of_sparse": math.exp(sum(map(math.log, wins)) / len(wins)) if wins else None}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
