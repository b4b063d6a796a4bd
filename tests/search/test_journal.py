"""Optuna's journal, unlocked and made again, with real journals and locks."""

import json
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from synthetic_study import ROOT, SyntheticStudy

from raysearch.config import study_of
from raysearch.search import journal
from raysearch.search.journal import open_journal, remove_stale_lock
from raysearch.search.sampler import Sampler
from raysearch.study.damage import damaged_line
from raysearch.study.ledger import Ledger
from raysearch.study.records import objective_values
from raysearch.study.storage import AnyPath, StorePath, working_copy


@pytest.mark.parametrize(("tail", "line"), [(b"", None), (b'{"op_code": 4', 4), (b'{"op_code": 4}', 4), (b"\x00\x00\n", 4),
                                            (b"3\n", 4)])
def test_a_damaged_line_is_found(tmp_path: Path, tail: bytes, line: int | None) -> None:
    path = tmp_path / "journal.log"
    study = optuna.create_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name="s")
    study.ask()
    whole = path.read_bytes().splitlines(keepends=True)[:3]
    assert len(whole) >= 2
    line = None if line is None else len(whole) + 1
    assert damaged_line(b"".join(whole) + tail) == line
    assert damaged_line(whole[0] + b"{" + whole[1]) == 2


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
    assert (said, sorted(path.name for path in anywhere.iterdir())) == ([], ["journal.json", "journal.log"])


@pytest.mark.parametrize(("objective", "direction"), [("text/bits_per_byte", "MINIMIZE"), ("last_word/acc", "MAXIMIZE")])
def test_size_goes_down_and_quality_in_its_own_direction(tmp_path: Path, objective: str, direction: str) -> None:
    study = begin(tmp_path, [], objectives=("stored_bytes", objective))
    assert [each.name for each in study.directions] == ["MINIMIZE", direction]
    assert study.metric_names == ["stored_bytes", objective]


# ---- made again from the records ----


def searched(study: SyntheticStudy) -> optuna.Study:
    """A study with a trial of every kind of end, told as a sweep tells them."""
    study.dense()
    opened = open_journal(study.ledger, study.ledger.study().study, lambda line: None)
    sampler = Sampler(opened, study.ledger.study().study, space)
    sampler.observe(None, study.ledger.candidate(ROOT))
    kinds = [{}, {"status": "failed", "num_finished": 0, "reason": "round 1: quality at chance"},
             {"status": "failed", "num_finished": 1, "reason": "round 2: killed", "crashed": True}, {}]
    for kind in kinds:
        asked = sampler.ask()
        changes = {name: kind[name] for name in ("status", "num_finished", "reason") if name in kind}
        study.trial(asked.number, [0.3, 0.6], **changes)
        record = study.ledger.trial(asked.number).model_copy(update={
            "parameters": asked.parameters, "distributions": asked.distributions, "forked_at": asked.forked_at,
            "crashed": kind.get("crashed", False)})
        study.ledger.write_trial(record)
        for key in record.keys:
            sampler.observe(asked.number, study.ledger.candidate(key))
        sampler.end(record)
    asked = sampler.ask()
    study.trial(asked.number, [0.3, 0.6], status="running", num_finished=1)
    study.ledger.write_trial(study.ledger.trial(asked.number).model_copy(update={
        "parameters": asked.parameters, "distributions": asked.distributions, "forked_at": asked.forked_at}))
    return opened


def space(trial: optuna.Trial) -> dict[str, Any]:
    mode = trial.suggest_categorical("mode", ["target", "rate"])
    return {"target_sparsity": trial.suggest_float("target_sparsity", 0.1, 0.9, log=True)} if mode == "target" else {
        "schedule": "constant", "rate": trial.suggest_float("rate", 0.1, 0.5),
        "num_rounds": trial.suggest_int("num_rounds", 1, 4)}


def known(study: optuna.Study) -> list[tuple]:
    return [(trial.number, trial.state.name, trial.values, trial.params, trial.distributions, trial.constraints,
             trial.user_attrs) for trial in study.trials]


def damage(path: Path, how: str) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    if how == "missing":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "torn":
        path.write_bytes(b"".join(lines)[:-7])
    elif how == "a line is lost":
        path.write_bytes(b"".join(lines[:-9]))
    else:
        lines[len(lines) // 2] = b"\x00garbage" + lines[len(lines) // 2][3:]
        path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("how", ["missing", "emptied", "torn", "a line is lost", "garbled in the middle"])
def test_it_is_made_again_from_the_records(tmp_path: Path, how: str) -> None:
    study = SyntheticStudy(tmp_path / "study", num_trials=9)
    before = known(searched(study))
    assert [state for _, state, *_ in before] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "RUNNING"]
    path = study.ledger.directory / "journal.log"
    damage(path, how)
    damaged = path.read_bytes() if path.exists() else None
    said: list[str] = []
    again = open_journal(study.ledger, study.ledger.study().study, said.append)
    assert known(again) == before
    assert again.best_trials
    (line,) = said
    assert "made again from the records of 5 trials" in line
    kept = list(path.parent.glob("journal.log.replaced-*"))
    assert [file.read_bytes() for file in kept] == ([] if damaged is None else [damaged])
    assert known(open_journal(study.ledger, study.ledger.study().study, said.append)) == before
    assert len(said) == 1  # it is whole now
    again.ask()


def test_a_whole_journal_is_left_as_it_is(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study", num_trials=9)
    searched(study)
    path, said = study.ledger.directory / "journal.log", []
    before = path.read_bytes()
    open_journal(study.ledger, study.ledger.study().study, said.append)
    assert (said, path.read_bytes()[:len(before)]) == ([], before)


def test_other_objectives_are_told_from_the_same_records(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study", num_trials=9)
    searched(study)
    said: list[str] = []
    changed = study.ledger.study().study.replaced(objectives=("stored_bytes", "last_word/acc", "num_nonzero"))
    again = open_journal(study.ledger, changed, said.append)
    assert [each.name for each in again.directions] == ["MINIMIZE", "MAXIMIZE", "MINIMIZE"]
    assert again.trials[0].values == list(objective_values(study.ledger.candidate(study.ledger.trial(0).keys[-1]),
                                                           changed.search.objectives))
    assert "the journal is of other objectives" in said[0]


def test_a_number_that_never_began_stays_taken(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study", num_trials=9)
    study.dense()
    study.trial(2, [0.5])
    again = open_journal(study.ledger, study.ledger.study().study, lambda line: None)
    assert [trial.state.name for trial in again.trials] == ["FAIL", "FAIL", "COMPLETE"]
    assert again.ask().number == 3


def test_the_driver_says_that_it_removed_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "STALE_LOCK_S", 0.1)
    begin(tmp_path, []).ask()
    (tmp_path / "journal.log.lock").symlink_to("journal.log")
    said: list[str] = []
    assert len(begin(tmp_path, said).trials) == 1
    assert said == ["the journal was locked by a driver that is gone; its lock is removed"]
