"""What keeping a mask costs in a training step: the same engine with and without its masks, alternating in one process.

    python benchmarks/mask_overhead.py [MODEL] [--batch-tokens 2048] [--num-pairs 15] [--zero-stage 0]
    python benchmarks/mask_overhead.py 124m --batch-tokens 65536 --context-tokens 1024 --dtype bfloat16     # a GPU

MODEL is a folder, or one of benchmarks/training.py's shapes with random weights. The step is compiled where it can be.
Prints one JSON line. `ratio` is the median over pairs of (step with masks) / (step without).
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from training import SHAPES, config
from transformers import GPT2LMHeadModel

from raysearch.kernels.device import device_name
from raysearch.pruning.budgets import num_to_prune
from raysearch.pruning.selection import keep_masks
from raysearch.training.engine import Engine
from raysearch.training.hardware import can_compile


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="../shared/models/books-30m")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--context-tokens", type=int, default=256)
    parser.add_argument("--num-pairs", type=int, default=15)
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--l1-lambda", type=float, default=0.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.model in SHAPES:
            GPT2LMHeadModel(config(options.model)).to(torch.bfloat16).save_pretrained(folder)
        engine = Engine(folder if options.model in SHAPES else options.model, prunable="matrices",
                        zero_stage=options.zero_stage, dtype=options.dtype, batch_tokens=options.batch_tokens,
                        context_tokens=options.context_tokens, weight_decay=0.1, compiled=can_compile())
    values = [shard.values for shard in engine.prunable_shards]
    num_prunable = sum(value.numel() for value in values)
    keep = iter(keep_masks(values, [shard.index for shard in engine.prunable_shards], num_to_prune(0.5, num_prunable)))
    engine.set_masks([next(keep) if shard.name in engine.prunable_names else None for shard in engine.shards])
    engine.restart(0.0)
    masks = engine.optimizer.masks
    tokens = torch.randint(0, engine.model.config.vocab_size, (engine.sequences_per_rank, options.context_tokens))
    for _ in range(3):
        engine.train_step(tokens, 1e-4)
    steps: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(options.num_pairs):
        for masked in (pair % 2 == 0, pair % 2 == 1):
            engine.optimizer.masks = masks if masked else {}
            engine.optimizer.l1_lambda = options.l1_lambda if masked else 0.0
            steps[masked].append(seconds(lambda: engine.train_step(tokens, 1e-4)))
    upkeep = []
    engine.optimizer.masks = masks
    for _ in range(options.num_pairs):
        upkeep.append(seconds(lambda: engine.optimizer.keep_masks(1e-4)))
    without = statistics.median(steps[False])
    print(json.dumps({
        "benchmark": "mask_overhead", "model": options.model, "num_prunable": num_prunable,
        "ratio": round(statistics.median(a / b for a, b in zip(steps[True], steps[False])), 4),
        "upkeep_share": round(statistics.median(upkeep) / without, 5),
        "step_without_masks_s": round(without, 5), "step_with_masks_s": round(statistics.median(steps[True]), 5),
        "mask_upkeep_s": round(statistics.median(upkeep), 6), "num_pairs": options.num_pairs,
        "batch_tokens": options.batch_tokens, "zero_stage": options.zero_stage, "dtype": options.dtype,
        "l1_lambda": options.l1_lambda, "device": device_name(str(engine.device)), "torch": torch.__version__,
        "date": datetime.date.today().isoformat()}))


if __name__ == "__main__":
    main()
