"""Where and with what a number was made: time, device, versions, commit."""

import datetime
import functools
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from raysearch import __version__
from raysearch.study.records import Provenance

PACKAGES = ("torch", "transformers", "deepspeed", "ray", "optuna", "lm_eval", "datasets")


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def provenance(device: str, **gang: Any) -> Provenance:
    """`device`: the name of what computed, as people know it (kernels.device_name), since this module knows no torch."""
    return Provenance(created_at=utc_now(), git_commit=git_commit(), versions=versions(), device=device,
                      hostname=platform.node(), **gang)


@functools.cache
def versions() -> dict[str, str]:
    return {"raysearch-llm": __version__, "python": platform.python_version(),
            **{package: metadata.version(package) for package in PACKAGES}}


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, with "-dirty" where tracked files differ from it; None where the
    code is installed elsewhere."""
    git = shutil.which("git")
    if git is None:
        return None
    # --exclude=* leaves tags out, so that --always gives the commit
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


@functools.cache
def cpu_model() -> str:
    """As Linux names it; elsewhere the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
