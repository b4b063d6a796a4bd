"""One driver per study on a store, which has no locks: an object with the driver's name, written again every RENEW_S.

A driver that was not seen for STALE_S is given up, at once where its process is known to be dead. What remains racy: two
drivers that find no lease within the same moment. Each reads again SETTLE_S after its write, and only the last writer
stays, so both go on only where one took longer than that between its look and its write; then the one that was overwritten
ends itself at its next renewal. An age is the store's clock against this machine's, and these must agree to a minute.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from raysearch.study.storage import StorePath

RENEW_S = 20.0
STALE_S = 90.0  # four renewals may fail
SETTLE_S = 1.0


def holder(path: StorePath) -> tuple[bool, str, float]:
    """(whether a driver holds the lease now, its name, seconds since it was last seen); (False, "", 0.0) without one."""
    try:
        age_s = max(0.0, time.time() - path.stat().st_mtime)
        driver = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # a copied directory brings the lock file of a local study
        return False, "", 0.0
    here = process_table()
    dead = here is not None and here == driver["process_table"] and not Path(f"/proc/{driver['process']}").exists()
    return age_s < STALE_S and not dead, f"process {driver['process']} on {driver['host']}", age_s


def process_table() -> str | None:
    """Where it is equal, a process number means the same process: boot and namespace; None where that is unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


@contextlib.contextmanager
def lease(path: StorePath) -> Iterator[None]:
    """Held during the block; ValueError of one sentence where another driver holds it. Where another takes it over, which
    it may after STALE_S without a renewal, this process gets SIGTERM."""
    if holder(path)[0]:
        raise refusal(path)
    content = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "process_table": process_table(),
                          "began_at_s": time.time()}).encode()
    path.write_bytes(content)
    time.sleep(SETTLE_S)
    if holds(path, content) is not True:
        raise refusal(path)
    ended = threading.Event()
    renewal = threading.Thread(target=renew, args=(path, content, ended), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        with contextlib.suppress(OSError):  # it is given up in time
            if holds(path, content):
                path.unlink()


def holds(path: StorePath, content: bytes) -> bool | None:
    """Whether the lease is this driver's; None where there is none."""
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return None


def refusal(path: StorePath) -> ValueError:
    _, name, age_s = holder(path)
    return ValueError(f"{path.parent}: another driver runs this study ({name}, last seen {age_s:.0f} s ago); wait for it, or "
                      f"stop it first: one that was killed is given up after {STALE_S:g} s")


def renew(path: StorePath, content: bytes, ended: threading.Event) -> None:
    while not ended.wait(RENEW_S):
        with contextlib.suppress(OSError):  # the next turn may be luckier
            if holds(path, content) is False:
                print(f"raysearch: {path}: {holder(path)[1]} took this study over, because this driver was not seen for "
                      f"{STALE_S:g} s; this one ends", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            path.write_bytes(content)
