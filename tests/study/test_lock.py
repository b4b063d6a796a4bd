"""One driver per study in a local folder; on a store it is a lease, which test_lease.py tests."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest

from raysearch.study.lock import driver, lock


def _hold(directory: Path, held: object, release: object) -> None:
    with lock(directory):
        held.set()
        release.wait(20)


def test_a_second_driver_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(tmp_path, held, release))
    first.start()
    assert held.wait(20)
    refusal = pytest.raises(ValueError, match=f"another driver runs this study \\(process {first.pid} on ")
    with refusal, lock(tmp_path):
        pass
    assert driver(tmp_path) == (True, f"process {first.pid} on {socket.gethostname()}")
    first.kill()  # a killed driver leaves no lock behind
    first.join()
    assert driver(tmp_path) == (False, f"process {first.pid} on {socket.gethostname()}")
    with lock(tmp_path):
        pass


def test_a_refused_study_leaves_nothing_in_its_folder(tmp_path: Path) -> None:
    new = tmp_path / "deep" / "new"
    with pytest.raises(RuntimeError), lock(new):
        assert driver(new) == (True, f"process {os.getpid()} on {socket.gethostname()}")
        raise RuntimeError
    assert not new.exists()
    with pytest.raises(RuntimeError), lock(tmp_path):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    (tmp_path / "study.json").touch()
    with lock(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == ""


def test_a_file_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis.tex: is a file; give a directory with --out"), lock(tmp_path / "thesis.tex"):
        pass
