"""Optuna's journal: opened, unlocked and mended, in a file or on a store."""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from raysearch.config import Study, is_maximised
from raysearch.study.files import persist
from raysearch.study.ledger import Ledger
from raysearch.study.storage import StorePath, pull, push

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


def repair_journal(path: Path) -> Path | None:
    """Cuts a torn last line off Optuna's journal, which would swallow the next writer's; returns the backup's path."""
    if not path.is_file():
        return None
    good = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        good += len(line)
    if good == path.stat().st_size:
        return None
    backup = path.with_name(f"{path.name}.torn-{time.strftime('%Y%m%d-%H%M%S')}")
    shutil.copy2(path, backup)
    os.truncate(path, good)
    return backup


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
    """The study's Optuna journal: each objective in its own direction."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # metric names, grouped TPE
    path = ledger.directory / "journal.log"  # absolute: a relative path makes Optuna's lock spin for ever
    if isinstance(path, Path) and remove_stale_lock(path):
        echo("the journal was locked by a driver that is gone; its lock is removed")
    if isinstance(path, Path) and (backup := repair_journal(path)) is not None:
        echo(f"the journal's last line was torn and is cut off; the file as it was is kept as {backup.name}")
    backend = JournalFileBackend(str(path)) if isinstance(path, Path) else UploadedJournal(path)
    objectives = study.search.objectives
    opened = optuna.create_study(storage=JournalStorage(backend), study_name="raysearch", load_if_exists=True,
                                 directions=["maximize" if is_maximised(name) else "minimize" for name in objectives])
    opened.set_metric_names(list(objectives))
    opened.sampler = optuna.samplers.TPESampler(
        seed=study.search.sampler_seed + len(opened.get_trials(deepcopy=False)), multivariate=True, group=True)
    return opened
