"""The real search against what a user would do without it: `raysearch sweep`, and ray.tune with OptunaSearch, equal seconds.

    python benchmarks/search/end_to_end.py OUT.json [--seeds 5] [--seconds 240] [--model DIR]

The space is search_spaces.magnitude, and the model a GPT-2 of four layers that is trained first where there is none: no setting
of the search was chosen on either. All runs go at the same time, each with one worker of one thread and a Ray of its own, so
give it 1.5 cores for each of the 2 x `seeds` runs; it ends about 30 s after `seconds`, with one JSON line.

Both train and score with raysearch's own rounds. *Plain* is a function trainable in a process of its own for each trial, told
to Optuna's TPE by its last round, which alone counts; it need not score the dense model. Hypervolume: of fraction of the dense
size and of the dense loss, from the reference (1, 2), over the seconds since the command was started, imports and Ray included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from raysearch.config import Study, TrialConfig
from raysearch.frozen import parse
from raysearch.kernels.device import device_name
from raysearch.pruning.pareto import hypervolume
from raysearch.search.space import load_space
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import versions
from raysearch.study.records import RoundRecord
from raysearch.trial.inputs import read_inputs, resolve

SPACE = "search_spaces.magnitude"
REFERENCE = (1.0, 2.0)
Found = list[tuple[float, int, float]]
"""(seconds since the start, size, loss) of each candidate."""


def study_of_benchmark(model: Path, seed: int) -> Study:
    return resolve(load_space(SPACE)[0].replaced(
        path=str(model.resolve()), corpus="builtin", context_tokens=128, epoch_tokens=16_384, batch_tokens=1024,
        tasks=("text",), num_items=60, num_trials=100_000, max_concurrent=1, sampler_seed=seed, dense_control=False))


def make_model(model: Path) -> None:
    from raysearch.training.presets import PRESETS
    from raysearch.training.pretrain import pretrain

    PRESETS["end-to-end"] = replace(PRESETS["tiny"], num_layers=4, width=96, num_steps=500)
    pretrain("end-to-end", "builtin", model, echo=print)


def ours(model: Path, seed: int, seconds: float, folder: Path) -> None:
    """A sweep until the time is up."""
    from raysearch.search.sweep import sweep

    study = study_of_benchmark(model, seed).replaced(time_budget_s=seconds)
    sweep(SPACE, folder / "study", study, load_space(SPACE)[1], print)


def plain(model: Path, seed: int, seconds: float, folder: Path) -> None:
    """Ray Tune and OptunaSearch as their documentation has it for two metrics."""
    import optuna
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    study, space = study_of_benchmark(model, seed), load_space(SPACE)[1]
    dense = json.loads((model / "dense.json").read_text())

    def trainable(config: dict[str, Any]) -> None:
        import torch

        from raysearch.trial.actions import resolve_actions
        from raysearch.trial.round import run_round
        from raysearch.trial.worker import Worker

        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
        worker = Worker(study, Ledger(tempfile.mkdtemp(dir=folder)), read_inputs(study))
        fields = {name: value for name, value in config.items() if name in TrialConfig.model_fields}
        candidate = RoundRecord.model_validate(dense)
        for action in resolve_actions(parse(TrialConfig, fields, "config"), study, worker.inputs.num_train_tokens):
            candidate = run_round(worker, candidate, action)
        loss = candidate.metrics[study.search.objective].value
        with open(folder / "found.jsonl", "a") as file:
            file.write(json.dumps([time.time(), candidate.num_nonzero, loss]) + "\n")
        tune.report({"size": candidate.num_nonzero, "loss": loss})

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    ray.init(include_dashboard=False, num_cpus=1, log_to_driver=False, logging_level="error")
    search = OptunaSearch(space, metric=["size", "loss"], mode=["min", "min"], sampler=optuna.samplers.TPESampler(seed=seed))
    tune.Tuner(trainable, tune_config=tune.TuneConfig(search_alg=search, num_samples=-1, time_budget_s=seconds),
               run_config=tune.RunConfig(storage_path=str(folder), verbose=0)).fit()


def found_by(method: str, folder: Path, started: float) -> Found:
    if method == "plain":
        file = folder / "found.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [(when - started, size, loss) for when, size, loss in lines]
    ledger = Ledger(folder / "study")
    objective = ledger.study().study.search.objective
    return sorted((ledger.round_directory(key).joinpath("record.json").stat().st_mtime - started, record.num_nonzero,
                   record.metrics[objective].value) for key, record in ledger.rounds().items() if record.action is not None)


def curve(found: Found, dense: RoundRecord, objective: str, times: np.ndarray) -> np.ndarray:
    points = np.array([(size / dense.num_parameters, loss / dense.metrics[objective].value) for _, size, loss in found])
    ends = [sum(when <= time for when, *_ in found) for time in times]
    return np.array([hypervolume(points[:end], (False, False), REFERENCE) for end in ends])


def main() -> None:
    parser = argparse.ArgumentParser(description="the real search against Tune and OptunaSearch")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=Path("end_to_end/model"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--run", nargs=3, metavar=("METHOD", "SEED", "FOLDER"), help="one of the runs, for this script alone")
    options = parser.parse_args()
    if options.run is not None:
        method, seed, folder = options.run
        {"ours": ours, "plain": plain}[method](options.model, int(seed), options.seconds, Path(folder))
        return
    if not options.model.exists():
        make_model(options.model)
    dense = score_dense(options.model)
    with tempfile.TemporaryDirectory(prefix="raysearch-end-to-end-") as scratch:
        runs = [(method, seed, Path(scratch) / f"{method}-{seed}") for seed in range(options.seeds)
                for method in ("ours", "plain")]
        started, processes = time.time(), []
        for method, seed, folder in runs:
            folder.mkdir()
            command = [sys.executable, __file__, str(options.out), "--model", str(options.model.resolve()), "--seconds",
                       str(options.seconds), "--run", method, str(seed), str(folder)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYSEARCH_CACHE": str(folder / "cache")}
            with open(folder / "log", "w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        time.sleep(max(0.0, started + options.seconds - time.time()))
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
        found = {(method, seed): [each for each in found_by(method, folder, started) if each[0] <= options.seconds]
                 for method, seed, folder in runs}
        logs = {f"{method} {seed}": (folder / "log").read_text()[-300:] for method, seed, folder in runs
                if not found[method, seed]}
    times = np.linspace(0, options.seconds, 121)[1:]
    objective = load_space(SPACE)[0].search.objective
    curves = {method: np.array([curve(found[method, seed], dense, objective, times) for seed in range(options.seeds)])
              for method in ("ours", "plain")}
    goals = curves["plain"][:, -1]

    def seconds_to(share: float, method: str = "ours") -> list[float]:
        """To this share of plain's final hypervolume with the same seed."""
        return [float(times[(each >= share * goal).argmax()]) if (each >= share * goal).any() else float("inf")
                for each, goal in zip(curves[method], goals)]

    result = {"benchmark": "search/end_to_end", "space": SPACE, "seeds": options.seeds, "seconds": options.seconds,
              "hypervolume": {method: {f"{fraction:g}": each[:, int(len(times) * fraction) - 1].round(4).tolist()
                                       for fraction in (0.25, 0.5, 1.0)} for method, each in curves.items()},
              "ours_s_to_95%_of_plains_last": seconds_to(0.95), "ours_s_to_plains_last": seconds_to(1.0),
              "plain_s_to_its_last": seconds_to(1.0, "plain"),
              "num_candidates": {method: [len(found[method, seed]) for seed in range(options.seeds)] for method in curves},
              "failed": logs, "device": device_name("cpu"), "num_cores": os.cpu_count(), "date": date.today().isoformat(),
              **versions()}
    options.out.write_text(json.dumps({**result, "times": times.tolist(),
                                       "curves": {method: each.round(5).tolist() for method, each in curves.items()}}))
    print(json.dumps(result))


def score_dense(model: Path) -> RoundRecord:
    """The dense baseline, also written beside the model, for the trials of plain."""
    import torch

    from raysearch.trial.round import dense_round
    from raysearch.trial.worker import Worker

    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    study = study_of_benchmark(model, 0)
    with tempfile.TemporaryDirectory() as folder:
        dense = dense_round(Worker(study, Ledger(folder), read_inputs(study)))
    (model / "dense.json").write_text(dense.model_dump_json())
    return dense


if __name__ == "__main__":
    main()
