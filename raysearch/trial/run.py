"""A trial, or a control: its actions one after the other, each a round, and a record that is written after each."""

import time
import traceback
from collections.abc import Iterator, Sequence

import torch

from raysearch.config import Action
from raysearch.study.provenance import utc_now
from raysearch.study.records import TrialRecord
from raysearch.training.finetune import Diverged
from raysearch.trial.round import dense_round, run_round
from raysearch.trial.worker import Worker


class Superseded(Exception):
    """This gang was given up, for example behind a network that broke, and its trial was started again or ended since."""


def number_of(actions: tuple[Action, ...], trials: Sequence[TrialRecord]) -> int:
    """Of the trial of these actions, or of the next one: a record in between may be lost."""
    new = 1 + max((trial.number for trial in trials), default=-1)
    return next((trial.number for trial in trials if trial.actions == actions), new)


def run_trial(worker: Worker, trial: TrialRecord) -> Iterator[TrialRecord]:
    """Runs the trial's actions; yields its record, already written, after every round and at the end.

    A diverged trial ends as failed. Any other error is recorded as failed and raised: the gang may be out of step. Raises
    Superseded, and leaves the record, where another gang has begun the trial since.
    """
    started = time.perf_counter()

    def write(**changes: object) -> None:
        nonlocal trial
        trial = trial.model_copy(update={**changes, "seconds": round(time.perf_counter() - started, 3)})
        if worker.engine.rank == 0:
            worker.ledger.write_trial(trial)

    def update(**changes: object) -> TrialRecord:
        if worker.engine.rank == 0:
            found = worker.ledger.trial(trial.number)
            if (found.started_at, found.status) != (trial.started_at, "running"):
                raise Superseded(f"{trial.name} was begun here at {trial.started_at}, but its record is of another "
                                 f"gang now ({found.status}, begun at {found.started_at}); nothing is written")
        write(**changes)
        return trial

    write(status="running", keys=(), reason=None, traceback=None, crashed=False, ended_at=None, started_at=utc_now())
    try:
        candidate = dense_round(worker)
        for action in trial.actions:
            candidate = run_round(worker, candidate, action, raced=not (trial.is_control or trial.is_finish))
            updated = update(keys=(*trial.keys, candidate.key))
            if len(trial.keys) > (trial.forked_at or 0):  # else it is the candidate of another trial
                yield updated
        yield update(status="done", ended_at=utc_now())
    except Diverged as error:
        yield update(status="failed", reason=f"round {len(trial.keys) + 1}: {error}", ended_at=utc_now())
    except Exception as error:
        reason = f"round {len(trial.keys) + 1}: {type(error).__name__}: {error}{advice(error)}"
        update(status="failed", crashed=True, reason=reason, traceback=traceback.format_exc(), ended_at=utc_now())
        raise


def advice(error: Exception) -> str:
    """What to do about an error of a trial, where we know."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return ("; the trial needs more memory than there is: shorten context_tokens, or shard it over more ranks "
                "with num_ranks and zero_stage")
    return ""
