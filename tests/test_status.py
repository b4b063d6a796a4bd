"""`raysearch status` on studies that stand still, run, and were killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_study import SyntheticStudy, twelve_trials

from raysearch.status import describe_status, study_status
from raysearch.study.ledger import Ledger


def test_twelve_trials(tmp_path: Path) -> None:
    status = study_status(twelve_trials(tmp_path))
    ledger = Ledger(tmp_path)
    assert (status.driver_running, status.driver) == (False, "")
    assert sum(status.trials.values()) == len(ledger.trials())
    assert status.num_candidates == len(ledger.rounds()) - 1
    assert {trial.number for trial in status.failed} == {t.number for t in ledger.trials() if t.status == "failed"}
    sizes, values = [c.num_nonzero for c in status.frontier], [c.value for c in status.frontier]
    assert sizes == sorted(sizes)
    assert values == sorted(values, reverse=True)  # bits per byte: the larger, the better
    text = describe_status(status)
    assert "driver      not running\n" in text
    assert all(f"failed      trial {trial.number}: {trial.reason}" in text for trial in status.failed)
    assert max(map(len, text.splitlines())) < 200


def test_a_study_before_its_first_round(tmp_path: Path) -> None:
    SyntheticStudy(tmp_path)
    status = study_status(tmp_path)
    assert (status.num_candidates, status.dense_value, status.frontier) == (0, None, ())
    assert "trials      none begun" in describe_status(status)


def test_a_driver_that_runs_and_one_that_was_killed(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.dense()
    study.trial(0, [0.3, 0.5], status="running")
    code = (f"from raysearch.study.ledger import Ledger; import os, sys\n"
            f"with Ledger({str(tmp_path)!r}).lock():\n    print('locked', flush=True); sys.stdin.read(1); os._exit(9)")
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout.readline() == "locked\n"
        status = study_status(tmp_path)
        assert status.driver_running
        assert f"process {driver.pid} on " in status.driver
        (trial,) = status.running
        assert (trial.number, trial.num_rounds_done) == (0, 2)
        assert 0 <= trial.silent_s < 60
        assert "running     trial 0: round 2/" in describe_status(status)
        driver.communicate("x")
    status = study_status(tmp_path)
    assert not status.driver_running
    assert f"process {driver.pid} on " in describe_status(status)
    assert "interrupted trial 0" in describe_status(status)
    with Ledger(tmp_path).lock():  # the probe left no lock behind
        pass


def test_the_command_needs_no_ray_and_prints_json(tmp_path: Path) -> None:
    directory = twelve_trials(tmp_path)
    code = ("import sys; sys.argv = ['raysearch', 'status', sys.argv[1], '--json']\n"
            "from raysearch.cli import main\n"
            "try:\n    main()\n"
            "finally:\n    print([m for m in ('torch', 'ray', 'optuna') if m in sys.modules], file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert json.loads(done.stdout)["num_candidates"] == study_status(directory).num_candidates


@pytest.mark.parametrize(("make", "sentence"), [(False, "no such study directory"), (True, "holds no study")])
def test_no_study(tmp_path: Path, make: bool, sentence: str) -> None:
    folder = tmp_path / "x"
    if make:
        folder.mkdir()
    with pytest.raises(ValueError, match=sentence):
        study_status(folder)


def test_a_control_has_its_line(tmp_path: Path) -> None:
    directory = twelve_trials(tmp_path)
    without = study_status(directory)
    assert without.control is None
    study = SyntheticStudy(tmp_path)  # on the same directory
    study.control(report=False, num_finished=1, status="running")
    line = "control     round 1/3 finished, text/bits_per_byte 1.925 ± 0.020 on the selection split, without pruning\n"
    assert line in describe_status(study_status(directory))
    study.control(report=False, num_finished=0, status="failed", reason="round 1: diverged")
    status = study_status(directory)
    assert "control     failed after round 0/3 finished: round 1: diverged\n" in describe_status(status)
    assert (status.num_candidates, status.frontier, status.trials) == (without.num_candidates, without.frontier, without.trials)
