"""How a sweep ends: on a signal, and where Ray's memory monitor ends one of its processes."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError


@contextlib.contextmanager
def out_of_memory_as_death() -> Iterator[None]:
    """In the block a process that Ray's memory monitor ends counts like one that died. Tune (2.60) knows RayActorError and
    RayTaskError only, and OutOfMemoryError, which is neither, would end the whole search."""
    original = RayActorManager._actor_task_failed

    def task_failed(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        is_out_of_memory = isinstance(exception, OutOfMemoryError)
        original(manager, tracked_actor_task, RayActorError(error_msg=str(exception)) if is_out_of_memory else exception)

    RayActorManager._actor_task_failed = task_failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = original


EXIT_WITHIN_S = 2.0
"""`ray job stop` kills 3 s after its SIGTERM."""


def end_within(seconds: float, code: int) -> None:
    """From now on this process ends in so many seconds at most, and as soon as Python is done: the interpreter's own end takes
    seconds, stops the clock, and waits for actors that no node can run."""

    def end() -> None:
        ray.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    limit = threading.Timer(seconds, os._exit, (code,))
    limit.daemon = True
    limit.start()
    atexit.register(end)


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) and Ctrl-C KeyboardInterrupt in the block; the process ends within EXIT_WITHIN_S,
    and at once on a second signal: nothing needs to be saved. Enter it after `ray.init`, which sets its own handler."""

    def stop(number: int, frame: object) -> None:
        code = 128 + number
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))
        end_within(EXIT_WITHIN_S, code)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(code)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
