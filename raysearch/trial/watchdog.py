"""What a gang does when a round takes too long or a peer dies: write the stacks and end the process.

Nothing inside a stuck collective can be asked to stop, so the clocks here end the process; Tune starts the gang again.
"""

import contextlib
import faulthandler
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ray
from ray.exceptions import OutOfMemoryError, RayActorError

from raysearch.study.records import TrialRecord
from raysearch.study.storage import StorePath, push, working_copy

RANK_0_EXTRA_S = 2.0
"""Its clock for a round runs longer, so that its peers have written their stacks when its death ends them."""
RANK_0_UPLOAD_EXTRA_S = 10.0
"""The same where they upload them to a store."""
UPLOAD_LIMIT_S = 30.0
"""For a stuck process to upload its stacks to a store."""
GRACE_S = 5.0
"""For rank 0 to find by itself that a peer died; over NCCL it would wait until the round's limit."""


@contextlib.contextmanager
def ended_when_stuck(limit_s: float, stack_path: Path) -> Iterator[None]:
    """Where the block takes longer, writes the stacks of this process to `stack_path` and ends it, whatever it waits for:
    the clock is a C thread that needs no interpreter lock."""
    stack_path.parent.mkdir(exist_ok=True)
    with open(stack_path, "w") as file:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    stack_path.unlink(missing_ok=True)  # two gangs that score candidates share a path


@contextlib.contextmanager
def uploaded_when_stuck(limit_s: float, stack_path: StorePath, push_log: Callable[[], None]) -> Iterator[None]:
    """`ended_when_stuck` with an upload, which needs the interpreter lock: where that is held too, no stack is uploaded."""
    stack_path.unlink(missing_ok=True)  # of an attempt before this one

    def upload_and_end() -> None:
        with open(working_copy(stack_path), "w") as file:
            faulthandler.dump_traceback(file)
        push(stack_path)
        push_log()
        os._exit(1)

    clock = threading.Timer(limit_s, upload_and_end)
    clock.daemon = True
    clock.start()
    with ended_when_stuck(limit_s + UPLOAD_LIMIT_S, working_copy(stack_path)):
        try:
            yield
        finally:
            clock.cancel()


def exit_when_lost(others: list[ray.ObjectRef], done: threading.Event) -> None:
    """Ends this process when the actor of one of `others` dies, unless `done` is set soon after."""
    try:
        ray.get(others)
    except (RayActorError, OutOfMemoryError) as error:
        if not done.wait(GRACE_S):
            print(f"a rank of this gang died: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    except ray.exceptions.RayTaskError:
        pass  # an error of the peer's own, which `step` raises


NUM_FRAMES = 4


def stuck(trial: TrialRecord, limit_s: float, stacks: Mapping[str, str]) -> str:
    """One sentence: which round took too long, and the innermost frames of every rank that told."""
    where = []
    for rank, stack in stacks.items():
        main_thread = stack.rstrip().split("\n\n")[-1]  # faulthandler writes the oldest thread last
        frames = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', main_thread)[:NUM_FRAMES]
        where.append(f"{rank} in " + ", called by ".join(
            f"{name} ({Path(file).name}:{line})" for file, line, name in frames))
    return (f"round {len(trial.keys) + 1} took longer than round_limit_s = {limit_s:g} s, twice: {'; '.join(where)}; raise "
            "round_limit_s if it was only slow")
