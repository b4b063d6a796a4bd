"""What methods that work while they train cost a step: rounds of each in turn, in one process, against a dense step.

    python benchmarks/method_overhead.py [--shape 124m] [--batch-tokens 65536] [--turns 3] [--methods movement,rigl]

Steps are those in which masks change at the default interval (the middle of a round); what comes before the first step is not
counted. On a GPU the step is compiled. `ratio` is the median over turns of a method's step and the dense step of its turn.
"""

import argparse
import datetime
import json
import math
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from raysearch.cluster.placement import MicroBatch
from raysearch.config import ClusterSettings, TrialConfig, study_of
from raysearch.frozen import parse
from raysearch.kernels.device import device_name
from raysearch.pruning.budgets import pruning_steps
from raysearch.training.engine import Engine
from raysearch.training.hardware import can_compile
from raysearch.trial.actions import resolve_actions
from raysearch.trial.pruner import Pruner

SHAPES = {"tiny": (2, 64, 2, 64, 512), "124m": (12, 768, 12, 1024, 50_257)}
"""Layers, width, heads, context, vocabulary."""
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"target_sparsity": 0.0}, "magnitude": {}, "gradual magnitude": {"criterion": "gradual_magnitude"},
    "movement": {"criterion": "movement"}, "soft movement": {"criterion": "soft_movement", "threshold": 0.3},
    "SR-STE 2:4": {"criterion": "sr_ste", "pattern": "2:4"}, "RigL": {"criterion": "rigl"}, "SET": {"criterion": "set"},
    "gates of heads": {"criterion": "l0", "pattern": "head", "target_sparsity": 0.5},
    "gates of neurons": {"criterion": "l0", "pattern": "neuron", "target_sparsity": 0.5},
    "group lasso": {"pattern": "neuron", "target_sparsity": 0.5, "group_lambda": 0.01}, "LayerDrop": {"layer_drop": 0.2},
    "KL": {"distill_alpha": 2 / 3}, "KL and SquareHead": {"distill_alpha": 2 / 3, "distill_hidden": 1.0}}
LIMITS = {name: 1.4 if name.startswith("KL") else 1.03 for name in METHODS}
NUM_STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="124m", choices=SHAPES)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    layers, width, heads, context, vocab = SHAPES[options.shape]
    torch.set_num_threads(math.ceil(ClusterSettings().cpus_per_rank))  # as a gang's rank has
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(
            vocab_size=vocab, n_positions=context, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)).to(torch.bfloat16).save_pretrained(folder)
        engine = Engine(folder, prunable="matrices", zero_stage=0, dtype="bfloat16", batch_tokens=options.batch_tokens,
                        context_tokens=context, weight_decay=0.1, compiled=can_compile(),
                        micro_batch=MicroBatch(options.batch_tokens, is_checkpointed=False))
        study = study_of(path=folder, dtype="bfloat16", batch_tokens=options.batch_tokens, context_tokens=context,
                         epoch_tokens=10 * NUM_STEPS * options.batch_tokens)
        tokens = torch.randint(0, vocab, (options.batch_tokens // context, context))
        names = ["dense", *(name for name in options.methods.split(",") if name != "dense")]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(options.turns + 1):  # the first warms up
            for name in names:
                has_target = METHODS[name].keys() & {"threshold", "pattern", "target_sparsity"}
                fields = {"finetune_epochs": 1.0, "learning_rate": 1e-4, **METHODS[name],
                          **({} if has_target else {"target_sparsity": 0.5})}
                action, = resolve_actions(parse(TrialConfig, fields, name), study, study.data.epoch_tokens or 0)
                took = seconds_a_step(engine, action, tokens)
                print(name, round(took, 5), file=sys.stderr, flush=True)
                if turn:
                    seconds[name].append(took)
    ratios = {name: round(statistics.median(a / b for a, b in zip(seconds[name], seconds["dense"])), 4) for name in names[1:]}
    print(json.dumps({
        "benchmark": "method_overhead", "shape": options.shape, "batch_tokens": options.batch_tokens, "turns": options.turns,
        "step_s": {name: round(statistics.median(each), 5) for name, each in seconds.items()}, "ratio": ratios,
        "over_limit": {name: ratio for name, ratio in ratios.items() if ratio > LIMITS[name]},
        "is_compiled": engine.is_compiled, "device": device_name(str(engine.device)), "torch": torch.__version__,
        "date": datetime.date.today().isoformat()}))


def seconds_a_step(engine: Engine, action: Any, tokens: torch.Tensor) -> float:
    """Of NUM_STEPS from the first on after which masks may change."""
    engine.load_base()
    pruner = Pruner(engine, action, 10 * NUM_STEPS)
    engine.restart(action.l1_lambda, action.distill_alpha, action.temperature, action.distill_hidden)
    pruner.begin()
    first = pruning_steps(10 * NUM_STEPS)[0]
    for step in range(first - 1, first + NUM_STEPS):
        if step == first:
            if engine.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
        engine.train_step(tokens, action.learning_rate)
        pruner.after_step(step)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / NUM_STEPS


if __name__ == "__main__":
    main()
