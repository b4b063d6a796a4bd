"""One process of a gang: it begins a job, then steps through it, a round at a time."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from raysearch.cluster.joining import use_rays_network
from raysearch.config import Study
from raysearch.study.ledger import Ledger
from raysearch.study.records import RoundRecord, config_hash
from raysearch.study.storage import StorePath, pull, push
from raysearch.training.finetune import Diverged
from raysearch.trial.actions import resolve_actions
from raysearch.trial.inputs import read_inputs
from raysearch.trial.round import dense_round, mend_candidate, report_round
from raysearch.trial.run import run_trial
from raysearch.trial.watchdog import RANK_0_EXTRA_S, RANK_0_UPLOAD_EXTRA_S, ended_when_stuck, uploaded_when_stuck
from raysearch.trial.worker import Worker

Job = dict[str, Any]
"""What the searcher suggests; gang.py says which there are."""
RECORDED = ("trial", "control")
"""Kinds of jobs that have a TrialRecord: lists of actions."""


class Rank:
    """One process of a gang."""

    def __init__(self, study: Study, directory: str, root_key: str, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        use_rays_network()
        if not study.cluster.gpus_per_rank:
            os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(max(1, int(study.cluster.cpus_per_rank)))
        inputs = read_inputs(study)
        if inputs.root_key != root_key:
            raise ValueError(f"rank {environment['RANK']} reads another model, corpus or task than the driver (root key "
                             f"{inputs.root_key}, not {root_key}); every node must see the same files at {study.model.path}")
        self.worker = Worker(study, Ledger(directory), inputs)
        self._results: Iterator[dict[str, Any]] = iter(())

    def begin(self, job: Job) -> str | None:
        """Makes `job` the one that `step` works on; for a trial or a control, the hash of what this rank resolves it to.

        Touches nothing of the job: Tune may have started a gang for it that is not needed, as a warm one became free.
        """
        ledger, number, rank = self.worker.ledger, job.get("number", -1), self.worker.engine.rank
        self._log_path, self._stack_path = ledger.log_path(number, rank), ledger.stack_path(number, rank)
        print_to(pull(self._log_path))
        self._results = self._run(job)
        if job["kind"] not in RECORDED:
            return None
        study, trial = self.worker.study, ledger.trial(number)
        return config_hash(study, trial.actions if trial.config is None else
                           resolve_actions(trial.config, study, self.worker.inputs.num_train_tokens))

    def step(self) -> dict[str, Any]:
        """The job's next result; "done" is True in its last."""
        path, limit_s = self._stack_path, self.worker.study.cluster.round_limit_s
        if self.worker.engine.rank == 0:
            limit_s += RANK_0_UPLOAD_EXTRA_S if isinstance(path, StorePath) else RANK_0_EXTRA_S
        try:
            with (uploaded_when_stuck(limit_s, path, self._push_log) if isinstance(path, StorePath)
                  else ended_when_stuck(limit_s, path)):
                return next(self._results)
        except Exception:
            traceback.print_exc()  # into the log
            raise
        finally:
            self._push_log()

    def _push_log(self) -> None:
        """To a store; one that refuses it costs no trial. What a process prints after this is lost when it is killed."""
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            push(self._log_path)

    def _run(self, job: Job) -> Iterator[dict[str, Any]]:
        ledger = self.worker.ledger
        if job["kind"] in RECORDED:
            log_path = str(ledger.log_path(job["number"], 0))
            for record in run_trial(self.worker, ledger.trial(job["number"]).model_copy(update={"log_path": log_path})):
                key = record.keys[-1] if record.keys else None
                numbers = measured(ledger.candidate(key)) if key and record.status == "running" else {}
                yield {"done": record.status != "running", "status": record.status, "key": key, **numbers}
        elif job["kind"] == "mend":
            trial = None if job["trial"] is None else ledger.trial(job["trial"])
            actions, raced = (trial.actions, not (trial.is_control or trial.is_finish)) if trial else ((), True)
            candidate = mend_candidate(self.worker, actions, job["key"], raced)
            yield {"done": True, "status": "done", "key": candidate.key, **measured(candidate)}
        else:
            try:
                dense = dense_round(self.worker)
            except Diverged:  # another gang would find the same
                traceback.print_exc()
                yield {"done": True, "status": "failed"}
                return
            candidate = dense if job["kind"] == "dense" else ledger.candidate(job["key"])
            report = report_round(self.worker, candidate)
            yield {"done": True, "status": "done", "key": candidate.key, **measured(candidate),
                   **{f"report/{name}": metric.value for name, metric in report.items()}}


def measured(record: RoundRecord) -> dict[str, float]:
    """A candidate's numbers under the names that TensorBoard and the other loggers show."""
    numbers = record.model_dump(include={"depth", "sparsity", "model_sparsity", "num_nonzero", "stored_bytes",
                                         "resident_bytes", "predicted_ms", "train_loss", "prune_s", "finetune_s", "evaluate_s"},
                                exclude_none=True)
    return numbers | {name: metric.value for name, metric in record.metrics.items()}


def print_to(path: Path) -> None:
    """From now on this process prints to the end of `path`, its C libraries too: a file that every node sees."""
    path.parent.mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
