"""How a command ends on a signal, and how Tune's actors end: with it, and where Ray's memory monitor ends one."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def ending_actors() -> Iterator[None]:
    """In the block a process that Ray's memory monitor ends counts like one that died: Tune (2.60) knows RayActorError and
    RayTaskError only, and OutOfMemoryError, which is neither, would end the whole search. Where Ctrl-C or SystemExit leaves the
    block and the process stays, as a notebook's, Tune's actors are killed: Tune does it after an Exception only."""
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    begin, original = RayActorManager.__init__, RayActorManager._actor_task_failed
    managers: list[RayActorManager] = []

    def begun(manager: RayActorManager, resource_manager: Any) -> None:
        managers.append(manager)
        begin(manager, resource_manager)

    def task_failed(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        is_out_of_memory = isinstance(exception, OutOfMemoryError)
        original(manager, tracked_actor_task, RayActorError(error_msg=str(exception)) if is_out_of_memory else exception)

    RayActorManager.__init__, RayActorManager._actor_task_failed = begun, task_failed
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if not _ends.is_set():
            for manager in managers[:]:  # which `cleanup` begins anew
                manager.cleanup()
        raise
    finally:
        RayActorManager.__init__, RayActorManager._actor_task_failed = begin, original


EXIT_WITHIN_S = 2.0
"""`ray job stop` kills 3 s after its SIGTERM."""
_ends = threading.Event()
"""This process does."""


def end_within(seconds: float, code: int) -> None:
    """From now on this process ends in so many seconds at most, and as soon as Python is done: the interpreter's own end takes
    seconds, stops the clock, and waits for actors that no node can run."""

    def end() -> None:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    _ends.set()
    limit = threading.Timer(seconds, os._exit, (code,))
    limit.daemon = True
    limit.start()
    atexit.register(end)


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """For a command: SIGTERM raises SystemExit(143) and Ctrl-C KeyboardInterrupt in the block; the process ends within
    EXIT_WITHIN_S, and at once on a second signal: nothing needs to be saved."""

    def stop(number: int, frame: object) -> None:
        code = 128 + number
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))
        end_within(EXIT_WITHIN_S, code)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(code)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items() if not _ends.is_set() else ():
            signal.signal(number, handler)
