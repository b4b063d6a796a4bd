import re
from pathlib import Path

import pytest
from synthetic_study import ROOT, SyntheticStudy
from synthetic_study import twelve_trials as twelve

from raysearch.search import progress as progress_module
from raysearch.search.progress import Progress, last_line
from raysearch.study.ledger import Ledger


@pytest.fixture
def study(tmp_path: Path) -> SyntheticStudy:
    """The dense baseline, which has 2.0000 on the selection split and 2.0100 on the report split."""
    study = SyntheticStudy(tmp_path / "study", num_trials=5)
    study.dense()
    return study


def begun(study: SyntheticStudy) -> tuple[Progress, list[str]]:
    lines: list[str] = []
    return Progress(study.ledger, study.ledger.study().study, ROOT, lines.append), lines


def without_counts(lines: list[str]) -> list[str]:
    """The lines without their clock and without the counts of trials."""
    parts = [re.fullmatch(r"\[ *\d+ s\] (.*) \| trials: .*", line) for line in lines]
    return [part[1] for part in parts if part]


def test_the_dense_baseline_has_a_line_for_each_split(study: SyntheticStudy) -> None:
    progress, lines = begun(study)
    progress.ended({"kind": "dense"}, error=False)
    assert without_counts(lines) == ["selection split, dense baseline: sparsity 0.000 text/bits_per_byte 2.0000",
                                     "report split, dense baseline: sparsity 0.000 text/bits_per_byte 2.0100"]


def test_a_round_tells_the_selection_value_and_a_report_job_the_report_value(study: SyntheticStudy) -> None:
    *_, key = study.trial(0, [0.3, 0.5, 0.7], status="running", num_finished=2, report=True)
    progress, lines = begun(study)
    progress.round_done({"kind": "trial", "number": 0})
    progress.ended({"kind": "report", "key": key}, error=False)
    assert without_counts(lines) == ["trial 0 round 2/3: sparsity 0.500 text/bits_per_byte 2.1500",  # 2 + 1.2 * 0.5^3
                                     "report split: sparsity 0.500 text/bits_per_byte 2.1650"]


def test_a_report_job_that_failed_tells_no_value(study: SyntheticStudy) -> None:
    (key,) = study.trial(0, [0.5])
    progress, lines = begun(study)
    progress.ended({"kind": "report", "key": key}, error=True)
    assert lines == []


def test_trials_are_counted_by_their_end(study: SyntheticStudy) -> None:
    study.trial(0, [0.5])  # done by a driver before this one
    progress, lines = begun(study)
    for number in (1, 2, 3):
        progress.started({"kind": "trial", "number": number})
    study.trial(1, [0.4])
    study.trial(2, [0.4], status="failed", num_finished=0, reason="round 1: diverged")
    study.trial(3, [0.2, 0.3], status="running", num_finished=1)
    progress.ended({"kind": "trial", "number": 1}, error=False)
    progress.ended({"kind": "trial", "number": 2}, error=False)
    progress.round_done({"kind": "trial", "number": 3})
    assert lines[0] == "trial 2 failed: round 1: diverged"
    assert lines[1].endswith("| trials: 1 running, 2 done, 0 stopped, 1 failed of 5")


def test_trials_that_ended_before_this_sweep_are_counted(tmp_path: Path) -> None:
    ledger = Ledger(twelve(tmp_path))
    progress = Progress(ledger, ledger.study().study, ROOT, print)
    assert progress.count == {"running": 0, "done": 7, "stopped": 2, "failed": 2}


@pytest.mark.parametrize(("text", "said"), [("one\nValueError: two\n\n", "ValueError: two"), ("", "its process died"),
                                            (None, "its process died")])
def test_the_last_line_of_a_log(tmp_path: Path, text: str | None, said: str) -> None:
    log = tmp_path / "00000.rank-0.log"
    if text is not None:
        log.write_text(text)
    assert last_line(log) == f"{said} (log in {log})"


def test_a_control_is_named_and_is_not_counted_as_a_trial(study: SyntheticStudy) -> None:
    study.trial(0, [0.3, 0.5], finetune_epochs=1.0)
    *_, last = study.control(status="running")
    progress, lines = begun(study)
    progress.started({"kind": "control", "number": -2})
    progress.round_done({"kind": "control", "number": -2})
    study.finish(-2)
    progress.ended({"kind": "control", "number": -2}, error=False)
    progress.ended({"kind": "report", "key": last}, error=False)
    assert without_counts(lines) == [  # 2 - 0.1 * 1 / (1 + 1)
        "control round 2/2: sparsity 0.000 text/bits_per_byte 1.9500",
        "report split, dense control: sparsity 0.000 text/bits_per_byte 1.9600"]
    assert all(line.endswith("| trials: 0 running, 1 done, 0 stopped, 0 failed of 5") for line in lines)
    study.finish(-2, num_finished=0, status="failed", reason="round 1: diverged")
    progress.ended({"kind": "control", "number": -2}, error=False)
    assert lines[-1] == "control failed: round 1: diverged"


def test_what_is_left_counts_the_control_and_then_the_report(study: SyntheticStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    progress, lines = begun(study)
    progress.ended({"kind": "dense"}, error=False)  # the gangs are ready
    for number in range(5):
        progress.started({"kind": "trial", "number": number})
        clock[0] += 10
        study.trial(number, [0.1 * number + 0.2, 0.9], finetune_epochs=1.0)  # of 25 s, says its record
        progress.ended({"kind": "trial", "number": number}, error=False)
        progress.round_done({"kind": "trial", "number": number})
    assert [line.partition("of 5")[2] for line in lines[2:]] == [
        f", about {10 * left + 25} s left, and the report split" for left in (4, 3, 2, 1)] + [""]
    assert progress.count["done"] == 5
    progress.ended({"kind": "trial", "number": 4}, error=False)  # heard twice, counted once
    assert progress.count["done"] == 5
    said = []
    for left in (3, 2, 1):
        progress.reports_left = left
        progress.started({"kind": "report", "key": ROOT})
        clock[0] += 4
        progress.ended({"kind": "report", "key": ROOT}, error=False)
        said.append(lines[-1].partition("of 5")[2])
    assert said == [", 2 to report, about 8 s left", ", 1 to report, about 4 s left", ""]
