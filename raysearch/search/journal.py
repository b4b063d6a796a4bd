"""Optuna's journal: opened, unlocked, and made again from the records, in a file or on a store."""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from raysearch.config import Study, is_maximised
from raysearch.search.sampler import told_again
from raysearch.study.files import persist
from raysearch.study.ledger import Ledger
from raysearch.study.records import TrialRecord, objective_values
from raysearch.study.storage import AnyPath, StorePath, pull, push

STUDY_NAME = "raysearch"
STALE_LOCK_S = 3.0
"""Optuna holds its lock for milliseconds."""


def remove_stale_lock(path: Path) -> bool:
    """Removes the lock that a killed writer left on the journal at `path`: one that stays the same for STALE_LOCK_S.

    Optuna would wait 30 s for it, and for ever, at full speed, where the link names a folder that was moved since.
    """
    lock = path.with_name(f"{path.name}.lock")
    before = [file.lstat().st_mtime_ns for file in (lock,) if file.is_symlink()]
    if not before:
        return False
    time.sleep(STALE_LOCK_S)
    if not lock.is_symlink() or lock.lstat().st_mtime_ns != before[0]:
        return False
    lock.unlink()
    return True


def damaged_line(data: bytes) -> int | None:
    """Number of the first line of a journal that is none of Optuna's; None for a whole journal. A torn last line would
    swallow the next writer's."""
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        try:
            whole = line.endswith(b"\n") and isinstance(json.loads(line), dict)
        except ValueError:
            whole = False
        if not whole:
            return number
    return None


class UploadedJournal(JournalFileBackend):
    """Optuna's journal on a store: this driver's copy, uploaded whole after every change, before the ledger hears of it. A
    kill between the two loses that change, which `StudySearcher` makes again from the ledger."""

    def __init__(self, path: StorePath) -> None:
        self._store_path = path
        super().__init__(str(pull(path)))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        super().append_logs(logs)
        persist(self._store_path, lambda: push(self._store_path))


def open_journal(ledger: Ledger, study: Study, echo: Callable[[str], None]) -> optuna.Study:
    """The study's Optuna journal, each objective in its own direction.

    The records are the truth. A journal that is missing, damaged, of other objectives, or that does not know how a recorded
    trial ended, is made again from them; the file as it was is kept.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # metric names, grouped TPE
    path = ledger.directory / "journal.log"  # absolute: a relative path makes Optuna's lock spin for ever
    if isinstance(path, Path) and remove_stale_lock(path):
        echo("the journal was locked by a driver that is gone; its lock is removed")
    records, opened = ledger.trials(), None
    wrong = "is missing"
    if path.is_file():
        data = path.read_bytes()
        line = damaged_line(data)
        wrong = f"is damaged in line {line}" if line else "is empty"
        if data and line is None:
            opened = _load(path, study)
            wrong = disagreement(opened, study, records)
    if opened is None or wrong:
        if path.is_file() or records:
            echo(f"the journal {wrong}; it is made again from the records of {len(records)} trials{_set_aside(path)}")
        opened = _load(path, study)
        for trial in _from_records(ledger, study, records):
            opened.add_trial(trial)
    opened.set_metric_names(list(study.search.objectives))
    opened.sampler = optuna.samplers.TPESampler(
        seed=study.search.sampler_seed + len(opened.get_trials(deepcopy=False)), multivariate=True, group=True)
    return opened


def _load(path: AnyPath, study: Study) -> optuna.Study:
    backend = JournalFileBackend(str(path)) if isinstance(path, Path) else UploadedJournal(path)
    storage = JournalStorage(backend)
    if STUDY_NAME in [known.study_name for known in storage.get_all_studies()]:
        return optuna.load_study(storage=storage, study_name=STUDY_NAME)
    return optuna.create_study(storage=storage, study_name=STUDY_NAME, directions=_directions(study))


def _directions(study: Study) -> list[str]:
    return ["maximize" if is_maximised(name) else "minimize" for name in study.search.objectives]


def disagreement(opened: optuna.Study, study: Study, records: Sequence[TrialRecord]) -> str:
    """In what the journal is not what the records say; "" where they agree. What was asked but never recorded is no
    disagreement: it never began."""
    if [each.name.lower() for each in opened.directions] != _directions(study) or opened.metric_names not in (
            None, list(study.search.objectives)):
        return "is of other objectives"
    trials = opened.get_trials(deepcopy=False)
    for record in records:
        if record.number >= len(trials):
            return f"does not know trial {record.number}"
        if trials[record.number].state.is_finished() != (record.status != "running"):
            return f"does not know how trial {record.number} ended"
    return ""


def _from_records(ledger: Ledger, study: Study, records: Sequence[TrialRecord]) -> Iterator[FrozenTrial]:
    """Every number from 0 on, those of trials that never began as failures."""
    objectives, dense = study.search.objectives, ledger.round(ledger.study().root_key) if records else None
    by_number = {record.number: record for record in records}
    for number in range(max(by_number, default=-1) + 1):
        record = by_number.get(number)
        if record is None:
            yield optuna.trial.create_trial(state=TrialState.FAIL)
            continue
        last = ledger.round(record.keys[-1]) if record.keys else dense
        yield told_again(record, objective_values(last, objectives) if last else None)


def _set_aside(path: AnyPath) -> str:
    """Keeps the journal as it was under another name; words that say so, "" where there is none."""
    if not path.is_file():
        return ""
    aside = path.parent / f"{path.name}.replaced-{time.strftime('%Y%m%d-%H%M%S')}"
    path.replace(aside)
    return f", and the file as it was is kept as {aside.name}"
