"""Optuna's journal, mended and unlocked, with real journals and locks."""

import json
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from raysearch.config import study_of
from raysearch.search import journal
from raysearch.search.journal import open_journal, remove_stale_lock, repair_journal
from raysearch.study.ledger import Ledger
from raysearch.study.storage import AnyPath, StorePath, working_copy


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


# ---- opened, in a folder and on a store ----


def begin(anywhere: AnyPath, said: list[str], **settings: object) -> optuna.Study:
    return open_journal(Ledger(anywhere), study_of(path="m", **settings), said.append)


def test_what_a_driver_told_is_there_for_the_next(anywhere: AnyPath) -> None:
    said: list[str] = []
    anywhere.mkdir(parents=True, exist_ok=True)
    first = begin(anywhere, said)
    assert first.metric_names == ["num_nonzero", "text/bits_per_byte"]
    first.tell(first.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), [5.0, 2.0])
    first.ask()
    stored = (anywhere / "journal.log").read_bytes()  # after every change, not at the end
    assert all(json.loads(line) for line in stored.splitlines())
    if isinstance(anywhere, StorePath):
        working_copy(anywhere / "journal.log").unlink()  # another machine has none
    second = begin(anywhere, said)
    assert [(trial.state.name, trial.values, trial.params) for trial in second.trials] == [
        (trial.state.name, trial.values, trial.params) for trial in first.trials]
    assert [trial.state.name for trial in second.trials] == ["COMPLETE", "RUNNING"]
    second.tell(1, [4.0, 3.0])
    assert len((anywhere / "journal.log").read_bytes()) > len(stored)
    assert (said, [path.name for path in anywhere.iterdir()]) == ([], ["journal.log"])


@pytest.mark.parametrize(("objective", "direction"), [("text/bits_per_byte", "MINIMIZE"), ("last_word/acc", "MAXIMIZE")])
def test_size_goes_down_and_quality_in_its_own_direction(tmp_path: Path, objective: str, direction: str) -> None:
    study = begin(tmp_path, [], objective=objective, size="stored_bytes")
    assert [each.name for each in study.directions] == ["MINIMIZE", direction]
    assert study.metric_names == ["stored_bytes", objective]


def test_the_driver_says_what_it_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "STALE_LOCK_S", 0.1)
    begin(tmp_path, []).ask()
    with open(tmp_path / "journal.log", "ab") as file:
        file.write(b'{"op_code": 4, "wor')
    (tmp_path / "journal.log.lock").symlink_to("journal.log")
    said: list[str] = []
    assert len(begin(tmp_path, said).trials) == 1
    (backup,) = tmp_path.glob("journal.log.torn-*")
    assert said == ["the journal was locked by a driver that is gone; its lock is removed",
                    f"the journal's last line was torn and is cut off; the file as it was is kept as {backup.name}"]
