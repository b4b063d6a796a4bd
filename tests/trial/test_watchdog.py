"""Processes that take too long end with their stacks written, in a folder and on a store; and what is told of them."""

import subprocess
import sys
import time
from pathlib import Path

from raysearch.config import Action, TrialConfig
from raysearch.study.records import TrialRecord
from raysearch.study.storage import AnyPath, StorePath
from raysearch.trial.watchdog import ended_when_stuck, stuck

TRIAL = TrialRecord(number=3, config=TrialConfig(target_sparsity=0.5), actions=(Action(sparsity=0.5),), keys=("a", "b"),
                    started_at="now")
STUCK = """
import sys, threading, time
from raysearch.study.storage import location
from raysearch.trial.watchdog import ended_when_stuck, uploaded_when_stuck

def wait_for_godot():
    time.sleep(60)

threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
path = location(sys.argv[1])
said = lambda: print("the log is pushed", flush=True)
with ended_when_stuck(0.5, path) if sys.argv[2] == "folder" else uploaded_when_stuck(0.5, path, said):
    print("began", flush=True)
    wait_for_godot()
print("went on")
"""


def stack_of_a_stuck_process(path: AnyPath, kind: str) -> str:
    process = subprocess.run([sys.executable, "-c", STUCK, str(path), kind], capture_output=True, text=True, timeout=50)
    assert process.returncode == 1, process.stderr
    assert process.stdout == "began\n" + "the log is pushed\n" * (kind == "store")
    return path.read_text()


def test_a_stuck_process_ends_with_its_stack_in_a_file(tmp_path: Path) -> None:
    stack = stack_of_a_stuck_process(tmp_path / "trials" / "00003.rank-0.stack", "folder")
    assert stuck(TRIAL, 0.5, {"rank 0": stack}) == (
        "round 3 took longer than round_limit_s = 0.5 s, twice: rank 0 in wait_for_godot (<string>:7), called by <module> "
        "(<string>:14); raise round_limit_s if it was only slow")


def test_a_stuck_process_uploads_its_stack_to_a_store(store: StorePath) -> None:
    stack = stack_of_a_stuck_process(store / "trials" / "00003.rank-0.stack", "store")
    assert "wait_for_godot" in stack


def test_a_block_that_ends_in_time_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "trials" / "x.stack"
    with ended_when_stuck(0.3, path):
        assert path.exists()
    assert not path.exists()
    time.sleep(0.4)  # the clock was stopped


def test_every_rank_that_told_is_named_with_its_innermost_frames() -> None:
    frames = "".join(f'  File "/code/part{number}.py", line {number} in f{number}\n' for number in range(6))
    stacks = {"rank 0": "Timeout (0:00:08)!\nThread 0x01 (most recent call first):\n" + frames,
              "rank 1": 'Timeout!\nThread 0x02:\n  File "/x/other.py", line 9 in helper\n\nThread 0x03:\n' + frames}
    told = stuck(TRIAL, 8.0, stacks)
    innermost = "f0 (part0.py:0), called by f1 (part1.py:1), called by f2 (part2.py:2), called by f3 (part3.py:3)"
    assert f"rank 0 in {innermost}; rank 1 in {innermost}; raise" in told
    assert "helper" not in told  # another thread's
