"""A sweep of short trials of a random model: the share of time in which the gangs idle, and trials per hour by their number.

    python benchmarks/gpu_sweep.py --model gpt2-124m --gangs 1,2 --gpus-per-rank 1

One gang of one rank for each GPU, a fresh study for each number of gangs. Busy is what the records say: prune_s +
finetune_s + evaluate_s of the trials' rounds. The wall clock runs from the first trial's begin to the last one's end, so
the gangs' start is outside and everything between trials, storing included, is inside. Prints one JSON line.
"""

import argparse
import json
import os
import sys
import tempfile
from datetime import date, datetime
from pathlib import Path

import ray
import torch
from random_study import model_folder, num_parameters, space, write_corpus

from raysearch.config import study_of
from raysearch.kernels.device import device_name
from raysearch.search.sweep import sweep
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import versions
from raysearch.trial.inputs import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description="idle share and weak scaling of a sweep")
    parser.add_argument("--model", default="tiny", help="tiny, gpt2-124m (both random) or a Hugging Face folder")
    parser.add_argument("--gangs", default="1,2", help="numbers of gangs, the first is the reference")
    parser.add_argument("--gpus-per-rank", type=float, default=0.0)
    parser.add_argument("--trials-per-gang", type=int, default=0, help="0: 16 trials in all whatever the number of gangs")
    parser.add_argument("--num-steps", type=int, default=60, help="optimizer steps of a trial's one round")
    parser.add_argument("--batch-tokens", type=int, default=0)
    parser.add_argument("--eval-items", type=int, default=200)
    arguments = parser.parse_args()
    gangs = [int(number) for number in arguments.gangs.split(",")]
    with tempfile.TemporaryDirectory(prefix="raysearch-gpu-sweep-") as name:
        folder = Path(name)
        os.environ["RAYSEARCH_CACHE"] = str(folder / "cache")
        context_tokens = 128 if arguments.model == "tiny" else 1024
        batch_tokens = arguments.batch_tokens or 16 * context_tokens
        on_gpu = bool(arguments.gpus_per_rank)
        study = resolve(study_of(
            path=str(model_folder(arguments.model, folder / "model", torch.bfloat16 if on_gpu else torch.float32)),
            corpus=str(write_corpus(folder / "corpus.txt")), tasks=("text",), num_items=arguments.eval_items,
            context_tokens=context_tokens, batch_tokens=batch_tokens, epoch_tokens=arguments.num_steps * batch_tokens,
            gpus_per_rank=arguments.gpus_per_rank, cpus_per_rank=1.0))
        num_gpus = {"num_gpus": max(gangs)} if on_gpu else {}
        ray.init(num_cpus=max(gangs) + 1, **num_gpus, include_dashboard=False, log_to_driver=False, logging_level="error")
        runs = []
        for number in gangs:
            num_trials = arguments.trials_per_gang * number or 16
            sweep("gpu_sweep", folder / f"study-{number}",
                  study.replaced(**{"num_trials": num_trials, "max_concurrent": number}), space,
                  lambda line: print(line, file=sys.stderr))
            runs.append(measure(Ledger(folder / f"study-{number}"), number))
        ray.shutdown()
        print(json.dumps({
            "benchmark": "gpu_sweep", "model": arguments.model, "num_parameters": num_parameters(Path(study.model.path)),
            "dtype": study.model.dtype, "num_steps": arguments.num_steps, "batch_tokens": batch_tokens, "runs": runs,
            "weak_scaling": [round(run["trials_per_h"] / runs[0]["trials_per_h"] * gangs[0] / run["gangs"], 3)
                             for run in runs],
            "date": date.today().isoformat(), "device": device_name("cuda:0" if on_gpu else "cpu"), **versions()}))


def measure(ledger: Ledger, num_gangs: int) -> dict[str, float]:
    trials, rounds = ledger.trials(), ledger.rounds()
    ended = {trial.number: (ledger.directory / "trials" / f"{trial.number:05d}.json").stat().st_mtime for trial in trials}
    begun = min(ended[trial.number] - trial.seconds for trial in trials)
    assert begun > datetime.fromisoformat(min(trial.started_at for trial in trials)).timestamp() - 2
    wall_s = max(ended.values()) - begun
    done = [rounds[key] for trial in trials for key in trial.keys]
    busy = {name: sum(getattr(record, name) for record in done) for name in ("prune_s", "finetune_s", "evaluate_s")}
    return {"gangs": num_gangs, "num_trials": len(trials), "wall_s": round(wall_s, 2),
            **{name: round(seconds, 2) for name, seconds in busy.items()},
            "idle_share": round(1 - sum(busy.values()) / (wall_s * num_gangs), 4),
            "trials_per_h": round(len(trials) / wall_s * 3600, 1)}


if __name__ == "__main__":
    main()
