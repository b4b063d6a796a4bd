"""One driver per study: a local file's lock, which the system takes back when its holder dies, or a store's lease."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

from raysearch.study.files import naming
from raysearch.study.lease import holder, lease
from raysearch.study.storage import AnyPath, StorePath


@contextlib.contextmanager
def lock(directory: AnyPath) -> Iterator[None]:
    """Held during the block; ValueError of one sentence, with the name of the first, for a second driver."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: is a file; give a directory with --out")
    if isinstance(directory, StorePath):
        with lease(directory / "lock"):
            yield
        return
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a+") as file:  # to open it with "w" would erase the name that a refusal tells
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{directory}: another driver runs this study ({file.read().strip()}); wait for it, or stop it "
                             "first") from None
        file.truncate(0)
        try:
            with naming(directory / "lock"):
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield
        finally:
            file.truncate(0)  # a name that stays is that of a killed driver
            if not (directory / "study.json").is_file():  # refused: nothing of ours stays in the folder
                (directory / "lock").unlink(missing_ok=True)
                if is_new:
                    with contextlib.suppress(OSError):
                        directory.rmdir()


def driver(directory: AnyPath) -> tuple[bool, str]:
    """(whether a driver holds the lock now, the name it wrote); one that was killed leaves its name behind."""
    if isinstance(directory, StorePath):
        return holder(directory / "lock")[:2]
    try:
        with open(directory / "lock") as file:
            if name := file.read().strip():  # else nobody holds it, and a driver that starts now is not disturbed
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False, name
    except FileNotFoundError:
        return False, ""
    except BlockingIOError:
        return True, name
