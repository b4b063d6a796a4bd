"""Faults that happen inside a worker: code that runs in every process of a sweep once it has imported raysearch.trial.round."""

import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SITE = '''
import importlib.abc, importlib.machinery, os, sys


class Faults(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "raysearch.trial.round":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            exec(open(os.environ["FAULT"]).read(), {"round": module})

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Faults())
'''


def inject(folder: Path, code: str, monkeypatch: object) -> None:
    """`code` runs with `round`, the module, in every process of sweeps that are started in `folder`."""
    (folder / "sitecustomize.py").write_text(SITE)
    (folder / "fault.py").write_text(code)
    monkeypatch.setenv("FAULT", str(folder / "fault.py"))


def workers(driver: int, name: str) -> list[psutil.Process]:
    """Ray's worker processes below a driver, by the title that Ray gives them ("ray::ResourceTrainable", "ray::Rank")."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if (process.cmdline() or [""])[0].startswith(name):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], object], process: subprocess.Popen, limit_s: float = 120) -> None:
    """Until `condition` holds; fails when the process that should bring it about has ended, with what it said."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)


@contextmanager
def refusing(seconds: float = threading.TIMEOUT_MAX) -> Iterator[None]:
    """For `seconds`, but no longer than the block, the system refuses every file of this process above 20 kB (EFBIG).

    A block, not a fixture: pytest's own output can be such a file, and it writes there before it tears fixtures down.
    """
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    timer = threading.Timer(seconds, resource.setrlimit, (resource.RLIMIT_FSIZE, old))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
