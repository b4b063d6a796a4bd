"""The sparse kernels against dense and torch's own, on a grid of layers.

    python benchmarks/sparse_kernels.py --cases must --out kernels.json      # the rows of issue 5, on a GPU
    python benchmarks/sparse_kernels.py --cases grid --out kernels.json
    python benchmarks/sparse_kernels.py --cases cpu --out kernels_cpu.json   # one core

Progress goes to stderr; prints one JSON line, and writes all records to --out.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from raysearch.kernels import benchmark
from raysearch.kernels.dispatch import time_in_turn
from raysearch.models.compact import compact
from raysearch.models.sparse import own_forward


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
        summary |= whole_model(device)
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


def whole_model(device: torch.device, num_tokens: int = 16384) -> dict[str, Any]:
    """GPT-2 XL, 1.5 B parameters, with half of the heads and MLP units pruned: forward of the dense form over the compact
    one's, in bf16."""
    with torch.device(device):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25)).to(torch.bfloat16).eval()
    forward = own_forward(model)
    with torch.no_grad():
        before = statistics.median(time_in_turn([lambda: forward(num_tokens)], device, benchmark.NUM_ROUNDS)[0])
        for block in model.transformer.h:
            block.mlp.c_proj.weight[torch.randperm(6400, device=device)[:3200]] = 0
            heads = torch.randperm(25, device=device)[:13]
            block.attn.c_proj.weight.view(25, 64, 1600)[heads] = 0
        cut = compact(model)
        after = statistics.median(time_in_turn([lambda: forward(num_tokens)], device, benchmark.NUM_ROUNDS)[0])
    return {"num_parameters_removed": cut.num_parameters, "num_tokens": num_tokens, "dense_us": before,
            "compact_us": after, "ratio": before / after}


if __name__ == "__main__":
    main()
