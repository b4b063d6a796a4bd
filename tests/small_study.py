"""A sweep in this process: the searcher's jobs by a rank of its own, with real models, rounds and journals, but without Ray."""

import contextlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from raysearch.config import Study
from raysearch.search import sweep as sweep_module
from raysearch.search.searcher import StudySearcher
from raysearch.study.ledger import Ledger
from raysearch.trial.rank import Rank
from raysearch.trial.worker import Worker


def space(trial: Any) -> dict[str, Any]:
    """Two rounds, trial 1 diverges."""
    fields = {"num_rounds": 2, "schedule": "linear", "finetune_epochs": 0.25}
    if trial.number == 1:
        return fields | {"target_sparsity": 0.5, "learning_rate": 10.0}
    return fields | {"target_sparsity": trial.suggest_float("target_sparsity", 0.3, 0.9),
                     "learning_rate": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}


def run_jobs(searcher: StudySearcher, worker: Worker) -> list[str]:
    """Plays Tune with one gang of one rank; the kinds of the jobs."""
    rank, kinds = Rank.__new__(Rank), []
    rank.worker = worker
    while (job := searcher.suggest(str(len(kinds)))) != Searcher.FINISHED:
        name, result = str(len(kinds)), {}
        kinds.append(job["kind"])
        try:
            for result in rank._run(job):
                if not result["done"]:
                    searcher.on_trial_result(name, result)
        except Exception:
            traceback.print_exc()
            searcher.on_trial_complete(name, None, error=True)
        else:
            searcher.on_trial_complete(name, result)
    return kinds


def sweep(directory: Path, study: Study, worker: Worker, monkeypatch: pytest.MonkeyPatch, echo: Callable[[str], None] = print,
          proposes: Callable[[Any], dict[str, Any]] = space) -> list[str]:
    """`raysearch sweep`, which says what it finds to `echo`; the kinds of the jobs that ran."""
    ran: list[str] = []

    def run(ledger: Ledger, study: Study, searcher: StudySearcher) -> bool:
        worker.ledger, worker.loaded_key = ledger, None
        ran.extend(run_jobs(searcher, worker))
        return not searcher.finished

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "start_ray", lambda *_: None)
        patch.setattr(sweep_module, "run_tune", run)
        patch.setattr(sweep_module, "watching_nodes", lambda *_: contextlib.nullcontext())
        sweep_module.sweep("small_study", directory, study, proposes, echo)
    return ran
