"""Sweeps as a user starts them: the command in a process of its own, on a real local Ray, with a real journal."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from raysearch.study.ledger import Ledger

ROOT = Path(__file__).parent.parent
SPACE = '''
STUDY = {{"model": {{"path": {model!r}}}, "data": {{"corpus": {corpus!r}, "context_tokens": 64, "epoch_tokens": 1024}},
         "training": {{"batch_tokens": 256}}, "evaluation": {{"num_items": 6, "tasks": ("text", "last_word")}},
         "search": {{"num_trials": {num_trials}, "max_concurrent": {max_concurrent}, "dense_control": {dense_control}}},
         "cluster": {{"num_ranks": {num_ranks}, "zero_stage": {zero_stage}, "cpus_per_rank": {cpus_per_rank},
                     "round_limit_s": {round_limit_s}}}}}


def space(trial):
    fields = {{"num_rounds": 2, "finetune_epochs": 1.0, "learning_rate": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}}
    if trial.number == 1:
        return fields | {{"target_sparsity": 0.5, "schedule": "linear", "learning_rate": 1e9}}
    if trial.suggest_categorical("mode", ["target", "threshold"]) == "target":
        return fields | {{"schedule": "cubic", "target_sparsity": trial.suggest_float("target_sparsity", 0.3, 0.9)}}
    return fields | {{"schedule": "linear", "threshold_unit": "std", "threshold": trial.suggest_float("threshold", 0.3, 1.0)}}
'''


def write_space(folder: Path, model: Path, corpus: Path, **settings: object) -> None:
    """Without a dense control, which most tests of faults do not look at, unless the settings ask for one."""
    defaults = {"num_trials": 4, "max_concurrent": 2, "num_ranks": 1, "zero_stage": 0, "cpus_per_rank": 0.5,
                "round_limit_s": 600.0, "dense_control": False}
    text = SPACE.format(model=str(model), corpus=str(corpus), **{**defaults, **settings})
    (folder / "space.py").write_text(text)


def sweep(folder: Path, *options: str, address: str | None = None,
          command: Sequence[str] = ()) -> subprocess.Popen:
    """The command, by default a sweep, on a Ray of its own or on the cluster at `address`."""
    environment = {**os.environ, "RAYSEARCH_CACHE": str(folder / "cache"),
                   "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    environment.pop("RAY_ADDRESS", None)
    environment |= {"RAY_ADDRESS": address} if address else {}
    command = command or [sys.executable, "-m", "raysearch", "sweep", "space", "--out", str(folder / "study"), *options]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, timeout_s: float = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def check_whole(folder: Path, num_trials: int) -> Ledger:
    """What must hold after any sequence of kills and resumes."""
    ledger = Ledger.open(folder / "study")
    trials = ledger.trials()
    assert [trial.number for trial in trials] == list(range(num_trials))
    assert Counter(trial.status for trial in trials) == {"done": num_trials - 1, "failed": 1}
    (failed,) = [trial for trial in trials if trial.status == "failed"]
    assert failed.number == 1
    assert "quality at chance" in failed.reason or "training loss became" in failed.reason
    rounds = ledger.rounds()
    assert {key for trial in [*trials, *ledger.controls()] for key in trial.keys} | {ledger.study().root_key} == set(rounds)
    with_control = ledger.study().study.search.dense_control
    assert {control.status for control in ledger.controls()} == ({"done"} if with_control else set())
    assert all(len(trial.keys) == len(trial.actions) for trial in trials if trial.status == "done")
    study = optuna.load_study(study_name="raysearch", storage=JournalStorage(
        JournalFileBackend(str(ledger.directory / "journal.log"))))
    assert len(study.trials) == num_trials
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials)
    assert 1 not in [trial.number for trial in study.best_trials]  # infeasible
    for trial, recorded in zip(trials, study.trials):
        if trial.status == "done":
            last = rounds[trial.keys[-1]]
            assert recorded.values == [last.num_nonzero, last.metrics["text/bits_per_byte"].value]
    assert ledger.report_metrics(ledger.study().root_key) is not None
    assert not list(ledger.directory.glob("rounds/.*"))
    return ledger
