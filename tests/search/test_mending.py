"""What a sweep does before it asks for anything; whole sweeps are in tests/study/test_damage.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_study import ROOT, SyntheticStudy

from raysearch.search.mending import mend


def whole(folder: Path) -> SyntheticStudy:
    study = SyntheticStudy(folder / "study")
    study.dense()
    study.trial(0, [0.3, 0.5], finetune_epochs=1.0)
    return study


def test_what_is_whole_is_not_touched(tmp_path: Path) -> None:
    study, said = whole(tmp_path), []
    before = {path: path.stat().st_mtime_ns for path in study.ledger.directory.rglob("*.json")}
    assert (mend(study.ledger, said.append), said) == ([], [])
    assert {path: path.stat().st_mtime_ns for path in study.ledger.directory.rglob("*.json")} == before


def test_a_record_comes_back_from_its_copy_and_the_damaged_one_is_kept(tmp_path: Path) -> None:
    study, said = whole(tmp_path), []
    path = study.ledger.trial_path(0)
    before = path.read_text()
    path.write_text(before.replace("12.5", "12.6").replace("25.0", "26.0"))
    assert mend(study.ledger, said.append) == []
    assert said == [f"found {path}: not a TrialRecord of this version of raysearch (its checksum is another one); it was "
                    "damaged or made by another version; its copy is read instead"]
    assert (path.read_text(), "26.0" in path.with_suffix(".damaged").read_text()) == (before, True)


@pytest.mark.parametrize("put", [Path.mkdir, lambda path: path.symlink_to("/none/x")], ids=["a folder", "a dead link"])
@pytest.mark.parametrize("name", ["trials/00000.json", "copies/00000.json", "rounds/KEY/record.json", "rounds/KEY/report.json"])
def test_what_lies_in_the_place_of_a_record_is_set_aside(tmp_path: Path, name: str, put: Callable[[Path], None]) -> None:
    study, said = whole(tmp_path), []
    path = study.ledger.directory / name.replace("KEY", ROOT)
    before = path.read_text()
    path.unlink()
    put(path)
    assert mend(study.ledger, said.append) == []
    assert (len(said), f"{path}: is missing" in said[0], path.read_text()) == (1, True, before)
    assert mend(study.ledger, said.append) == []
    assert len(said) == 1


def test_the_report_of_another_candidate_is_found(tmp_path: Path) -> None:
    study, said = whole(tmp_path), []
    path = study.ledger.round_directory(ROOT) / "report.json"
    before = path.read_text()
    other = study.ledger.trial(0).keys[1]
    study.ledger.write_report_metrics(other, {}, {})
    path.write_text((study.ledger.round_directory(other) / "report.json").read_text())
    assert mend(study.ledger, said.append) == []
    assert "its copy is read instead" in said[0]
    assert path.read_text() == before


def test_a_round_without_a_copy_is_a_job_and_a_stranger_stays(tmp_path: Path) -> None:
    study, said = whole(tmp_path), []
    lost = study.ledger.trial(0).keys[1]
    for path in (study.ledger.round_directory(lost) / "record.json", study.ledger.directory / "copies" / f"{lost}.record.json"):
        path.unlink()
    strangers = [study.ledger.directory / name for name in ("trials/00000-old.json", f"rounds/{ROOT} (1)/record.json",
                                                            f"copies/{ROOT} (1).report.json")]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_text("{}")
    assert mend(study.ledger, said.append) == [{"kind": "mend", "key": lost, "trial": 0}]
    assert len(said) == 4
    assert all(stranger.is_file() for stranger in strangers)
    (study.ledger.directory / "copies" / f"{ROOT}.record.json").unlink()
    (study.ledger.round_directory(ROOT) / "record.json").unlink()
    assert [job["key"] for job in mend(study.ledger, said.append)] == [ROOT, lost]


def test_copies_are_made_for_a_study_that_has_none(tmp_path: Path) -> None:
    study, said = whole(tmp_path), []
    for copy in study.ledger.matching("copies", "*.json"):
        copy.unlink()
    assert (mend(study.ledger, said.append), said) == ([], [])
    assert len(study.ledger.matching("copies", "*.json")) == 1 + 1 + 3 + 1
