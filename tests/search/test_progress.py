"""The lines that a sweep prints."""

from pathlib import Path

import pytest
from synthetic_study import ROOT, SyntheticStudy
from synthetic_study import twelve_trials as twelve

from raysearch.search.progress import Progress, last_line
from raysearch.study.ledger import Ledger


def test_a_line_says_what_ran_how_good_it_is_and_what_is_left(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path, num_trials=3), []
    study.dense()
    progress = Progress(study.ledger, study.ledger.study().study, ROOT, said.append)
    progress.ended({"kind": "dense"}, error=False)
    study.trial(0, [0.5, 0.75], status="running", num_finished=1)
    progress.started({"kind": "trial", "number": 0})
    progress.round_done({"kind": "trial", "number": 0})
    study.trial(0, [0.5, 0.75])
    progress.ended({"kind": "trial", "number": 0}, error=False)
    study.trial(1, [0.9], status="failed", num_finished=0, reason="round 1: the training loss became nan")
    progress.started({"kind": "trial", "number": 1})
    progress.ended({"kind": "trial", "number": 1}, error=False)
    assert [line.partition("] ")[2] or line for line in said] == [
        "dense baseline: sparsity 0.000 text/bits_per_byte 2.0000 | trials: 0 running, 0 done, 0 stopped, 0 failed of 3",
        "trial 0 round 1/2: sparsity 0.500 text/bits_per_byte 2.1500 | trials: 1 running, 0 done, 0 stopped, 0 failed of 3",
        "trial 1 failed: round 1: the training loss became nan"]
    assert progress.count == {"running": 0, "done": 1, "stopped": 0, "failed": 1}


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
