"""Kernels in C++ and CUDA, compiled on first use with the system's compiler and kept in the cache."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from raysearch.study.files import default_cache_dir

NUM_LOG_LINES = 3  # of the compiler's output in the error's sentence
NVCC = ("nvcc", "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")
HOPPER_NVCC = (*NVCC, "-gencode=arch=compute_90,code=sm_90")


def build(source: Path, command: Sequence[str]) -> ctypes.CDLL:
    """The shared library that `command` (compiler, then flags) makes of one source file, compiled once per machine kind.

    Its file is named by a hash of the source, the command, the compiler's version and, for flags with "native", the CPU's
    features; it appears under that name only when complete, so processes may build it at once. Raises OSError of one
    sentence when the compiler is absent or fails, or when the library does not load.
    """
    native = cpu_flags() if any("native" in flag for flag in command) else frozenset()
    text = "\0".join([source.read_text(), *command, compiler_version(command[0]), *sorted(native)])
    folder = default_cache_dir() / "kernels"
    library = folder / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what lies there is run as code
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{library.stem}-") as aside:
            unfinished = Path(aside, library.name)
            # the source goes first: some linkers drop libraries that are named before it
            run = subprocess.run([command[0], str(source), *command[1:], "-o", str(unfinished)], stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
            if run.returncode != 0 or not unfinished.exists():
                log = unfinished.with_suffix(".log")
                log.write_text(run.stdout)
                kept = log.replace(library.with_suffix(".log"))
                lines = " / ".join(run.stdout.strip().splitlines()[:NUM_LOG_LINES])
                raise OSError(f"{command[0]} could not compile {source.name} (exit code {run.returncode}): {lines}; "
                              f"its whole output is in {kept}")
            unfinished.replace(library)
    return ctypes.CDLL(str(library))


@functools.cache
def compiler_version(compiler: str) -> str:
    """What `compiler --version` says; OSError when there is no such program."""
    if shutil.which(compiler) is None:
        raise OSError(f"no compiler {compiler} on the PATH; install it, or add its folder to PATH "
                      f"({os.environ.get('PATH') or 'empty'})")
    run = subprocess.run([compiler, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return run.stdout


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The CPU's features as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
