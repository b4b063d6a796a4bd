"""Exact global magnitude threshold and masks against torch.nn.utils.prune.global_unstructured, side by side.

    python benchmarks/threshold.py [--num-weights 64000000] [--sparsity 0.8]

One thread, fp32, eight layers. Prints one JSON line. Bytes are the peak resident memory above the weights themselves,
the masks included, from VmHWM (Linux). Fails when the masks differ from torch's kthvalue rule.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from raysearch.pruning.budgets import num_to_prune
from raysearch.pruning.selection import keep_masks

NUM_LAYERS = 8
NUM_COLUMNS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description="exact global threshold against torch.nn.utils.prune")
    parser.add_argument("--num-weights", type=int, default=64_000_000)
    parser.add_argument("--sparsity", type=float, default=0.8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    num_rows = max(1, arguments.num_weights // (NUM_LAYERS * NUM_COLUMNS))
    layers = [nn.Linear(NUM_COLUMNS, num_rows, bias=False) for _ in range(NUM_LAYERS)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
    shards = [layer.weight.detach().flatten() for layer in layers]
    num_weights = sum(shard.numel() for shard in shards)
    num_prune = num_to_prune(arguments.sparsity, num_weights)
    index = list(range(NUM_LAYERS))
    keep_masks([torch.ones(10)], [0], 5)  # first calls load code
    masks, ours_s, ours_bytes = measure(lambda: keep_masks(shards, index, num_prune))
    num_ties = check(shards, masks, num_prune)
    amount = num_prune  # an int is a count: no second rounding rule
    pairs = [(layer, "weight") for layer in layers]
    _, torch_s, torch_bytes = measure(lambda: prune.global_unstructured(pairs, prune.L1Unstructured, amount=amount))
    num_different = sum(
        int((layer.weight_mask.flatten().bool() ^ mask).sum()) for layer, mask in zip(layers, masks, strict=True)
    )
    assert num_different <= num_ties, num_different  # torch may choose other ones of equal magnitude
    print(json.dumps(record(num_weights, arguments.sparsity, num_ties, (ours_s, ours_bytes), (torch_s, torch_bytes))))


def measure(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """(result, seconds, peak extra bytes) of one call."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    before = memory_bytes("VmRSS")
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start, memory_bytes("VmHWM") - before


def memory_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def check(shards: Sequence[Tensor], masks: Sequence[Tensor], num_prune: int) -> int:
    """Everything below torch's k-th magnitude is pruned, everything above it kept, and the count is exact; how many tie."""
    magnitudes = torch.cat(list(shards)).abs()
    kept = torch.cat(list(masks))
    threshold = magnitudes.kthvalue(num_prune).values
    assert int((~kept).sum()) == num_prune
    assert not kept[magnitudes < threshold].any()
    assert kept[magnitudes > threshold].all()
    return int((magnitudes == threshold).sum())


def record(
    num_weights: int, sparsity: float, num_ties: int, ours: tuple[float, int], theirs: tuple[float, int]
) -> dict[str, object]:
    return {
        "benchmark": "threshold",
        "num_weights": num_weights,
        "sparsity": sparsity,
        "num_threads": torch.get_num_threads(),
        "raysearch_s": round(ours[0], 3),
        "global_unstructured_s": round(theirs[0], 3),
        "times_faster": round(theirs[0] / ours[0], 1),
        "raysearch_extra_bytes_per_weight": round(ours[1] / num_weights, 2),
        "global_unstructured_extra_bytes_per_weight": round(theirs[1] / num_weights, 2),
        "num_ties": num_ties,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
