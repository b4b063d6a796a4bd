"""From the end of one trial to the first finished training step of the next: a warm gang against a fresh TorchTrainer.

    python benchmarks/trial_start.py --model gpt2-124m --num-ranks 2 --zero-stage 3 --gpus-per-rank 1

Both in one run, on the same model, ranks, ZeRO stage and batch. Ours is a real sweep: Optuna asks, the ledger writes, Tune
resets the gang, the base weights are copied back, the trial prunes and trains. The usual way is a Tune function that fits
a `TorchTrainer` whose workers start DeepSpeed and train on random tokens; it reads no corpus and prunes nothing. Both are
timed on rank 0, from the last result's report to the end of the next trial's first step. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from random_study import model_folder, num_parameters, space, write_corpus
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

import raysearch.search.sweep
from raysearch.config import Study, study_of
from raysearch.kernels.device import device_name
from raysearch.study.provenance import versions
from raysearch.training.engine import Engine
from raysearch.trial.gang import Gang
from raysearch.trial.inputs import resolve

NUM_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description="time between trials: a warm gang against a fresh TorchTrainer")
    parser.add_argument("--model", default="tiny", help="tiny, gpt2-124m (both random) or a Hugging Face folder")
    parser.add_argument("--num-ranks", type=int, default=1)
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--gpus-per-rank", type=float, default=0.0)
    parser.add_argument("--num-trials", type=int, default=8, help="of ours")
    parser.add_argument("--num-usual-trials", type=int, default=3, help="of the usual way; 0 leaves it out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raysearch-trial-start-") as name:
        folder = Path(name)
        os.environ["RAYSEARCH_CACHE"] = str(folder / "cache")
        os.environ["TIMES"] = str(folder / "times")
        context_tokens = 128 if arguments.model == "tiny" else 512
        study = resolve(study_of(
            path=str(model_folder(arguments.model, folder / "model",
                                   torch.bfloat16 if arguments.gpus_per_rank else torch.float32)),
            corpus=str(write_corpus(folder / "corpus.txt")), tasks=("text",), num_items=8,
            context_tokens=context_tokens, batch_tokens=4 * context_tokens * arguments.num_ranks,
            epoch_tokens=NUM_STEPS * 4 * context_tokens * arguments.num_ranks, num_trials=arguments.num_trials,
            num_ranks=arguments.num_ranks, zero_stage=arguments.zero_stage, gpus_per_rank=arguments.gpus_per_rank,
            cpus_per_rank=1.0))
        num_gpus = {"num_gpus": int(arguments.num_ranks * arguments.gpus_per_rank)} if arguments.gpus_per_rank else {}
        ray.init(num_cpus=max(arguments.num_ranks + 1, os.cpu_count() or 1), **num_gpus, include_dashboard=False,
                 log_to_driver=False, logging_level="error")
        ours = gaps(folder / "times", lambda: warm_gang(study, folder))
        usual = gaps(folder / "times", lambda: fresh_trainers(study, arguments.num_usual_trials, folder))
        ray.shutdown()
        print(json.dumps({
            "benchmark": "trial_start", "model": arguments.model, "num_parameters": num_parameters(Path(study.model.path)),
            "num_ranks": study.cluster.num_ranks, "zero_stage": study.cluster.zero_stage, "dtype": study.model.dtype,
            "gpus_per_rank": study.cluster.gpus_per_rank, "raysearch_median_s": middle(ours), "raysearch_worst_s": worst(ours),
            "raysearch_s": [round(gap, 3) for gap in ours], "torch_trainer_median_s": middle(usual),
            "torch_trainer_s": [round(gap, 3) for gap in usual],
            "times_faster": round(statistics.median(usual) / statistics.median(ours), 1) if usual else None,
            "date": date.today().isoformat(), "device": device_name("cuda:0" if study.cluster.gpus_per_rank else "cpu"),
            **versions()}))


def gaps(times: Path, run: Callable[[], None]) -> list[float]:
    """Seconds from each trial's "end" to the next "step" that `run` has its rank 0 write."""
    times.write_text("")
    run()
    events = [line.split() for line in times.read_text().splitlines()]
    seconds, ended = [], None
    for event, at in events:
        if event == "end":
            ended = float(at)
        elif ended is not None:
            seconds.append(float(at) - ended)
            ended = None
    return seconds


def note(event: str) -> None:
    with open(os.environ["TIMES"], "a") as file:
        file.write(f"{event} {time.time()}\n")


class Stopwatch:
    """Notes the first `step` after each `end`."""

    def __init__(self, engine: Engine) -> None:
        self.train_step, self.first = engine.train_step, True

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss = self.train_step(*arguments, **named)
        if self.first:
            float(loss)  # waits for the device
            if loss.is_cuda:
                torch.cuda.synchronize()
            note("step")
            self.first = False
        return loss


class TimedGang(Gang):
    """The product's trainable with a stopwatch on rank 0."""

    def setup(self, config: dict[str, Any], **kwargs: Any) -> None:
        super().setup(config, **kwargs)
        self.watch = self.rank_0.worker.engine.train_step = Stopwatch(self.rank_0.worker.engine)

    def step(self) -> dict[str, Any]:
        result = super().step()
        if result["done"] and not self.watch.first:
            self.watch.first = True
            note("end")
        return result


def warm_gang(study: Study, folder: Path) -> None:
    raysearch.search.sweep.Gang = TimedGang
    raysearch.search.sweep.sweep("trial_start", folder / "study", study, space, lambda line: print(line, file=sys.stderr))


def fresh_trainers(study: Study, num_trials: int, folder: Path) -> None:
    """The usual way, in Tune: one trainer after the other."""

    def train(config: dict[str, Any]) -> None:
        os.environ |= config["environment"]
        engine = Engine(study.model.path, prunable=study.model.prunable, zero_stage=study.cluster.zero_stage,
                        dtype=study.model.dtype, batch_tokens=study.training.batch_tokens,
                        context_tokens=study.data.context_tokens,
                        weight_decay=0.0)
        watch = Stopwatch(engine)
        tokens = torch.randint(200, (engine.sequences_per_rank, study.data.context_tokens))
        watch.first = engine.rank == 0
        for _ in range(NUM_STEPS):
            loss = watch(tokens, 1e-4)
        ray.train.report({"loss": float(loss)})
        if engine.rank == 0:
            note("end")

    def trial(config: dict[str, Any]) -> None:
        resources = {"CPU": 0.9} | ({"GPU": study.cluster.gpus_per_rank} if study.cluster.gpus_per_rank else {})
        environment = {"TIMES": os.environ["TIMES"]} | ({} if study.cluster.gpus_per_rank else {"DS_ACCELERATOR": "cpu"})
        TorchTrainer(
            train, train_loop_config={"environment": environment},
            scaling_config=ray.train.ScalingConfig(
                num_workers=study.cluster.num_ranks, use_gpu=bool(study.cluster.gpus_per_rank), resources_per_worker=resources),
            run_config=ray.train.RunConfig(name=f"train-{tune.get_context().get_trial_id()}",
                                           storage_path=str(folder / "usual"), callbacks=[TuneReportCallback()]),
        ).fit()

    if num_trials:
        tune.Tuner(
            tune.with_resources(trial, {"CPU": 0.1}), param_space={"index": tune.grid_search(list(range(num_trials)))},
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
            run_config=tune.RunConfig(storage_path=str(folder / "usual"), name="tune", verbose=0)).fit()


def middle(values: list[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


def worst(values: list[float]) -> float | None:
    return round(max(values), 3) if values else None


if __name__ == "__main__":
    main()
