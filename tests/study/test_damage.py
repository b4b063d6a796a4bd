"""Damages of every kind to a study that a real sweep made: named by each command, mended by the next sweep."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_study
from commands import Run
from damages import damage, stored_files

from raysearch.config import Study
from raysearch.study.damage import damaged_line, find_damage, journal_damage, summarised
from raysearch.study.ledger import Ledger
from raysearch.study.records import JournalSeal
from raysearch.trial.worker import Worker

REWRITTEN = ("journal.log", "copies/study.json")
"""What a sweep writes anew without looking at what was there, or names in its own words."""
DROP = ("--max-drop", "text/bits_per_byte=1")


@pytest.fixture(scope="module")
def finished(worker: Worker, study: Study, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Worker]]:
    """A finished study of 8 trials, one of which diverged, with its dense control; and the workbench, for other directories."""
    ledger, directory = worker.ledger, tmp_path_factory.mktemp("finished") / "study"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        small_study.sweep(directory, study.replaced(num_trials=8), worker, patch, lambda line: None)
    yield directory, worker
    worker.ledger, worker.loaded_key = ledger, None


def contents(study: Path) -> dict[str, bytes]:
    return {str(path.relative_to(study)): path.read_bytes() for path in stored_files(study)}


def check_damage(number: int, finished: tuple[Path, Worker], study: Study, folder: Path, run: Run,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    directory, worker = shutil.copytree(finished[0], folder / str(number)), finished[1]
    assert run("pick", directory, *DROP)[0] == 0
    before = contents(directory)
    path, kind = damage(directory, number)
    name = str(path.relative_to(directory))
    is_lost_pick = (name, kind) == ("pick.json", "removed")  # who wants it picks again
    commands = [("status",), ("results",), ("pick", *DROP, "--out", folder / "p.json"), ("report", "--out", folder / "r.html")]
    for command in commands[:3 if number % 4 else 4]:  # a page takes as long as all others
        code, _, err = run(command[0], directory, *command[1:])
        assert (code, name in err) == (0, not is_lost_pick), (number, name, kind, command, err)
    said: list[str] = []
    small_study.sweep(directory, study.replaced(num_trials=8), worker, monkeypatch, said.append)
    after = contents(directory)
    assert any(f"{path}: " in line for line in said) != is_lost_pick or name in REWRITTEN
    changed = {other for other in before if after.get(other) != before[other]} - {name, "journal.json"}
    assert not changed, (number, name, kind)
    assert name in after or is_lost_pick
    if path.suffix in (".npz", ".safetensors") or "copies" in path.parts or path.parent.name == "trials":
        assert after[name] == before[name], (number, name, kind)
    assert (run("status", directory)[2], small_study.sweep(
        directory, study.replaced(num_trials=8), worker, monkeypatch, said.append)) == ("", [])
    shutil.rmtree(directory)


@pytest.mark.parametrize("number", range(1000, 1020))
def test_a_damage_is_named_and_mended_and_the_rest_stays(number: int, finished: tuple[Path, Worker], study: Study,
                                                        tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check_damage(number, finished, study, tmp_path, run, monkeypatch)


@pytest.mark.slow
def test_200_damages(finished: tuple[Path, Worker], study: Study, tmp_path: Path, run: Run,
                     monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        check_damage(number, finished, study, tmp_path, run, monkeypatch)


@pytest.mark.parametrize("with_copies", [True, False])
def test_a_lost_round_is_computed_again(finished: tuple[Path, Worker], study: Study, tmp_path: Path, run: Run,
                                        monkeypatch: pytest.MonkeyPatch, with_copies: bool) -> None:
    """Without copies, as in a study from before there were some, it has new times and the same numbers."""
    directory, worker = shutil.copytree(finished[0], tmp_path / "study"), finished[1]
    ledger = Ledger(directory)
    before, trial = contents(directory), ledger.trial(2)
    lost = [ledger.candidate(key) for key in trial.keys]
    for key in trial.keys:
        shutil.rmtree(ledger.round_directory(key))
        for copy in [] if with_copies else directory.glob(f"copies/{key}.*"):
            copy.unlink()
    code, out, err = run("results", directory)
    assert code == 0
    assert all(f"{key}/record.json: is missing" in err for key in trial.keys)
    shown = [row.split() for row in out.splitlines()]  # other columns may be narrower
    assert all(row.split() in shown for row in run("results", finished[0])[1].splitlines() if row.split()[:1] == ["3"])
    kinds = small_study.sweep(directory, study.replaced(num_trials=8), worker, monkeypatch, lambda line: None)
    assert kinds[:2] == ["mend", "mend"]
    after = contents(directory)
    assert {name for name in before if after.get(name) != before[name]} <= {
        f"rounds/{key}/{name}" for key in trial.keys for name in ("record.json", "report.json")} | {
        f"copies/{key}.record.json" for key in trial.keys}
    for record in lost:
        again = ledger.candidate(record.key)
        assert (again.metrics, again.weights_sha256, again.items_sha256) == (
            record.metrics, record.weights_sha256, record.items_sha256)
    assert run("results", directory)[2] == ""


@pytest.mark.parametrize("how", ["a bad line in the middle", "no journal"])
def test_an_extended_study_keeps_its_trials_whatever_became_of_the_journal(
        finished: tuple[Path, Worker], study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    directory, said = shutil.copytree(finished[0], tmp_path / "study"), []
    journal, before = directory / "journal.log", contents(directory)
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[7] = b"\x00garbage" + lines[7][3:]
    journal.unlink() if how == "no journal" else journal.write_bytes(b"".join(lines))
    kinds = small_study.sweep(directory, study.replaced(num_trials=9), finished[1], monkeypatch, said.append)
    assert kinds.count("trial") == 1
    assert any("it is made again from the records of 8 trials" in line for line in said)
    after = contents(directory)
    assert {name for name in before if after.get(name) != before[name]} <= {
        "journal.log", "journal.json", "study.json", "copies/study.json"}
    assert [trial.number for trial in Ledger(directory).trials()] == list(range(9))


def test_deleted_weights_are_not_lost(finished: tuple[Path, Worker], study: Study, tmp_path: Path, run: Run,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    directory = shutil.copytree(finished[0], tmp_path / "study")
    ledger = Ledger(directory)
    ledger.delete_weights(ledger.rounds())
    assert run("results", directory)[2] == ""
    assert small_study.sweep(directory, study.replaced(num_trials=8), finished[1], monkeypatch, lambda line: None) == []


def test_what_was_written_before_there_were_checksums_is_whole(finished: tuple[Path, Worker], tmp_path: Path) -> None:
    directory = shutil.copytree(finished[0], tmp_path / "study")
    for path in directory.rglob("*.json"):
        text = path.read_text()
        path.write_text(text[:text.index(',\n "checksum"')] + "\n}")
    shutil.rmtree(directory / "copies")
    ledger = Ledger(directory)
    assert find_damage(ledger, ledger.trials(), ledger.rounds(), ledger.report_records()) == []


def test_a_journal_is_compared_with_its_seal() -> None:
    content = b'{"op_code":0}\n{"op_code":4,"value":1}\n'
    seal = JournalSeal(num_bytes=len(content), sha256="c4f1ee2a9ac4dd8d5dbd0dcd5e4ce9d9a9fb1c4c2a5e4e6bf3b36d6e6f5ec6b0")
    assert journal_damage(content, None) == ""
    assert journal_damage(content, seal) == "is damaged (its checksum is another one)"
    assert journal_damage(content * 2, None) == "is damaged in line 3"
    assert journal_damage(b"", None) == "is empty"
    assert damaged_line(content[:-2]) == 2


def test_many_files_of_one_kind_are_one_line() -> None:
    lost = [f"study/rounds/{key}/weights.safetensors: is missing; computed again" for key in "abcd"]
    other = "study/rounds/a/items.report.npz: is missing; computed again"
    assert list(summarised([*lost[:3], other])) == [*lost[:3], other]
    assert list(summarised([other, *lost])) == [
        other, "study/rounds/a/weights.safetensors and 3 more weights.safetensors: is missing; computed again"]
