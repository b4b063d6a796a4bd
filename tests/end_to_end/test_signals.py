"""A sweep that is told to stop: it exits in time, with the right code, and the same command completes the study."""

import signal
import subprocess
import sys
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


CELLS = """
import os, signal, threading, time
from pathlib import Path
import psutil, raysearch, space
study = Path("study")
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

def interrupt():
    while not list(study.glob("rounds/[!.]*/weights.safetensors")):
        time.sleep(0.05)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.5)

threading.Thread(target=interrupt).start()
try:
    raysearch.sweep(space.STUDY, space.space, study)
    raise SystemExit("was not interrupted")
except KeyboardInterrupt:
    print("interrupted")
try:
    time.sleep(4)
except KeyboardInterrupt:
    print("interrupted again")
gangs = [each for each in psutil.Process().children(recursive=True) if "ImplicitFunc" in each.name() or "Gang" in each.name()]
print(len(gangs), "gangs,", "handlers as before" if before[0] == signal.getsignal(signal.SIGINT) else "other handlers")
print(raysearch.sweep(space.STUDY, space.space, study).num_trials, "trials")
"""


@pytest.mark.slow
def test_ctrl_c_in_a_notebook_gives_control_back_and_the_same_call_goes_on(tmp_path: Path, tiny_model: Path,
                                                                            stories: Path) -> None:
    write_space(tmp_path, tiny_model, stories, num_trials=2)
    (tmp_path / "cells.py").write_text(CELLS)
    process = sweep(tmp_path, command=[sys.executable, "cells.py"])
    code, out, err = finish(process)
    assert code == 0, err
    said = [line for line in out.splitlines() if "interrupted" in line or "gangs" in line or line.endswith(" trials")]
    assert said == ["interrupted", "interrupted again", "0 gangs, handlers as before", "2 trials"], out + err
    check_whole(tmp_path, 2)
