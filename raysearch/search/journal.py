"""Optuna's journal: opened, unlocked, and made again from the records, in a file or on a store."""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from raysearch.config import Study, is_maximised
from raysearch.search.sampler import told_again
from raysearch.search.violations import violations
from raysearch.study.damage import journal_damage
from raysearch.study.files import is_there, persist
from raysearch.study.ledger import Ledger
from raysearch.study.records import JournalSeal, TrialRecord, objective_values
from raysearch.study.storage import AnyPath, StorePath, pull, push, working_copy

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


class WholeJournal(JournalFileBackend):
    """Optuna's journal, which never keeps half a change: where the disk refuses one, what was written of it is cut off again
    and it is tried once more, and then OSError names the file. On a store it is this driver's copy, uploaded whole after every
    change, before the ledger hears of it. A kill between the two loses that change, which `StudySearcher` makes again from the
    ledger."""

    def __init__(self, path: AnyPath) -> None:
        self._path = path
        super().__init__(str(pull(path)))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        file = working_copy(self._path)

        def append() -> None:
            num_bytes = file.stat().st_size
            try:
                super(WholeJournal, self).append_logs(logs)
            except OSError:
                os.truncate(file, num_bytes)
                raise

        persist(self._path, append)
        if isinstance(self._path, StorePath):
            persist(self._path, lambda: push(self._path))


class HeldJournal(BaseJournalBackend):
    """A journal in memory, to be written at once: appended change by change, that of 2,000 trials took 6 s of fsyncs."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        yield from self.logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.logs += json.loads(json.dumps(logs))  # as a file would give them back


def open_journal(ledger: Ledger, study: Study, echo: Callable[[str], None],
                 records: Sequence[TrialRecord] | None = None) -> optuna.Study:
    """The study's Optuna journal, each objective in its own direction. `records`: the ledger's trials, where they were read.

    The records are the truth. A journal that is missing, damaged, of other objectives, or that does not know how a recorded
    trial ended, is made again from them; the file as it was is kept.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # metric names
    path = ledger.directory / "journal.log"  # absolute: a relative path makes Optuna's lock spin for ever
    if isinstance(path, Path) and remove_stale_lock(path):
        echo("the journal was locked by a driver that is gone; its lock is removed")
    records, opened = ledger.trials() if records is None else records, None
    wrong = "is missing"
    if path.is_file() and not (wrong := journal_damage(path.read_bytes(), ledger.seal())):
        opened = _open(WholeJournal(path), study)
        wrong = disagreement(opened, study, records)
    if opened is None or wrong:
        kept = ""
        if is_there(path):
            aside = path.parent / f"{path.name}.replaced-{time.strftime('%Y%m%d-%H%M%S')}"
            path.replace(aside)
            kept = f", and the file as it was is kept as {aside.name}"
        if kept or records:
            echo(f"the journal {wrong}; it is made again from the records of {len(records)} trials{kept}")
        held = HeldJournal()
        again = _open(held, study)
        for trial in from_records(ledger, study, records):
            again.add_trial(trial)
        WholeJournal(path).append_logs(held.logs)
        opened = _open(WholeJournal(path), study)
    if opened.metric_names is None:
        opened.set_metric_names(list(study.search.objectives))
    seal_journal(ledger)
    return opened


def seal_journal(ledger: Ledger) -> None:
    """Writes down what the journal holds now, so that later damage to it is found."""
    content = working_copy(ledger.directory / "journal.log").read_bytes()
    seal = JournalSeal(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    if seal != ledger.seal():
        ledger.write_seal(seal)


def _open(backend: BaseJournalBackend, study: Study) -> optuna.Study:
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


def from_records(ledger: Ledger, study: Study, records: Sequence[TrialRecord]) -> Iterator[FrozenTrial]:
    """Every number from 0 on, those of trials that never began as failures."""
    objectives, dense = study.search.objectives, ledger.round(ledger.study().root_key) if records else None
    by_number = {record.number: record for record in records}
    for number in range(max(by_number, default=-1) + 1):
        record = by_number.get(number)
        if record is None:
            yield optuna.trial.create_trial(state=TrialState.FAIL)
            continue
        last = ledger.round(record.keys[-1]) if record.keys else dense
        yield told_again(record, objective_values(last, objectives) if last else None,
                         violations(last, dense, study.search) if last else {})
