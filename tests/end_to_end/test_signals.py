"""A sweep that is told to stop: it exits in time, with the right code, and the same command completes the study."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from sweeps import check_whole, finish, sweep, write_space

from raysearch.study.ledger import Ledger


def wait_for_a_round(process: subprocess.Popen, study: Path) -> None:
    """Until one candidate is finished and more are to come."""
    deadline = time.monotonic() + 120
    while not list(study.glob("rounds/[!.]*/weights.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_sigterm_ends_the_sweep_in_time_and_it_resumes(tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    write_space(tmp_path, tiny_model, stories, num_trials=2)
    process = sweep(tmp_path)
    wait_for_a_round(process, tmp_path / "study")
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 143, err
    assert time.monotonic() - told < 3  # what `ray job stop` allows before it kills
    assert "Traceback" not in err
    assert "goes on from the last finished round" in out
    assert Ledger(tmp_path / "study").driver() == (False, "")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "study" / "rounds").glob("[!.]*/record.json")}
    assert before
    code, out, err = finish(sweep(tmp_path))
    assert code == 0, err
    check_whole(tmp_path, 2)
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())


@pytest.mark.slow
def test_ctrl_c_is_130_and_a_second_one_ends_it_at_once(tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    write_space(tmp_path, tiny_model, stories)
    process = sweep(tmp_path)
    wait_for_a_round(process, tmp_path / "study")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    told = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert time.monotonic() - told < 1
    _, err = process.communicate()
    assert "Traceback" not in err
