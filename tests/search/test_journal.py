"""Optuna's journal, mended and unlocked, with real journals and locks."""

import json
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from raysearch.search import journal
from raysearch.search.journal import remove_stale_lock, repair_journal


def test_a_torn_journal_is_repaired_with_a_backup(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    storage = JournalStorage(JournalFileBackend(str(path)))
    optuna.create_study(storage=storage, study_name="s").ask()
    whole = path.read_bytes()
    assert repair_journal(path) is None
    for torn in (b'{"op_code": 4', b'{"op_code": 4}', b"\x00\x00\n"):
        path.write_bytes(whole + torn)
        backup = repair_journal(path)
        assert path.read_bytes() == whole
        assert backup.read_bytes() == whole + torn
        backup.unlink()
    again = optuna.load_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name="s")
    again.ask()
    assert len(again.trials) == 2
    assert json.loads(path.read_text().splitlines()[-1])


@pytest.mark.parametrize("target", ["journal.log", "/moved/since/journal.log"])
def test_a_lock_that_a_killed_driver_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr(journal, "STALE_LOCK_S", 0.3)
    path = tmp_path / "journal.log"
    optuna.create_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name="s")
    assert not remove_stale_lock(path)
    lock = tmp_path / "journal.log.lock"
    lock.symlink_to(target)
    assert remove_stale_lock(path)
    started = time.process_time()
    optuna.load_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name="s").ask()
    assert time.process_time() - started < 1
    assert not lock.is_symlink()


def test_a_lock_that_is_in_use_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "journal.log.lock"
    lock.symlink_to("journal.log")
    before = lock.lstat().st_mtime_ns

    def pass_on(seconds: float) -> None:
        """Meanwhile its holder is done and another has it."""
        while lock.lstat().st_mtime_ns == before:
            lock.unlink()
            lock.symlink_to("journal.log")

    monkeypatch.setattr(journal.time, "sleep", pass_on)
    assert not remove_stale_lock(tmp_path / "journal.log")
    assert lock.is_symlink()
