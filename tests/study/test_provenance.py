"""Where and with what a number was made."""

import datetime
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from raysearch.study import provenance as module
from raysearch.study.provenance import PACKAGES, cpu_model, git_commit, provenance, utc_now, versions

ROOT = Path(__file__).parents[2]


def test_the_time_is_utc_in_whole_seconds() -> None:
    told = datetime.datetime.fromisoformat(utc_now())
    assert told.utcoffset() == datetime.timedelta(0)
    assert told.microsecond == 0
    assert abs((datetime.datetime.now(datetime.UTC) - told).total_seconds()) < 5


def test_versions_are_those_that_are_installed() -> None:
    found = versions()
    assert set(found) == {"raysearch-llm", "python", *PACKAGES}
    assert found["torch"] == metadata.version("torch")
    assert found["python"] == platform.python_version()


def test_a_record_names_device_and_host() -> None:
    found = provenance("a GPU")
    assert (found.device, found.hostname, found.versions) == ("a GPU", platform.node(), versions())


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_commit_is_the_checkouts() -> None:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert git_commit() in (head, f"{head}-dirty")


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert git_commit.__wrapped__() is None


def test_the_processor_has_a_name() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "model name" in cpuinfo.read_text():
        assert cpu_model() in cpuinfo.read_text()
    else:
        assert cpu_model() == platform.machine()
