"""Compiling on first use, with the real compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raysearch.kernels import compiled

COMMAND = ("g++", "-shared", "-fPIC", "-O1")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    compiled.compiler_version.cache_clear()
    path = tmp_path / "seven.cpp"
    path.write_text('extern "C" int seven() { return 7; }')
    return path


def built(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "kernels").iterdir())


@needs_compiler
def test_compiles_once_for_the_same_source_and_command(source: Path, tmp_path: Path) -> None:
    assert compiled.build(source, COMMAND).seven() == 7
    [library] = built(tmp_path)
    made_at = library.stat().st_mtime_ns
    assert compiled.build(source, COMMAND).seven() == 7
    assert library.stat().st_mtime_ns == made_at
    source.write_text('extern "C" int seven() { return 8; }')
    assert compiled.build(source, COMMAND).seven() == 8
    assert compiled.build(source, (*COMMAND, "-DOTHER")).seven() == 8
    assert len(built(tmp_path)) == 3


@needs_compiler
def test_native_code_belongs_to_one_kind_of_cpu(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = (*COMMAND, "-march=native")
    compiled.build(source, native)
    monkeypatch.setattr(compiled, "cpu_flags", lambda: frozenset({"another"}))
    compiled.build(source, COMMAND)
    assert len(built(tmp_path)) == 2
    compiled.build(source, native)
    assert len(built(tmp_path)) == 3


def test_an_absent_compiler_is_one_sentence(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OSError, match=r"^no compiler g\+\+ on the PATH; install it, or add its folder to PATH \(empty\)$"):
        compiled.build(source, COMMAND)
    assert not (tmp_path / "cache").exists()


@needs_compiler
def test_a_failed_compilation_shows_its_first_lines_and_leaves_its_log(source: Path, tmp_path: Path) -> None:
    source.write_text("int seven() { return unknown_name; }")
    with pytest.raises(OSError, match=r"g\+\+ could not compile seven\.cpp \(exit code 1\): .*unknown_name") as error:
        compiled.build(source, COMMAND)
    [log] = built(tmp_path)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"its whole output is in {log}")
    assert "unknown_name" in log.read_text()


@needs_compiler
def test_processes_may_build_at_once(source: Path, tmp_path: Path) -> None:
    code = ("import sys, pathlib\nfrom raysearch.kernels.compiled import build\nprint('ready', flush=True)\ninput()\n"
            f"print(build(pathlib.Path(sys.argv[1]), {COMMAND}).seven())")
    several = [subprocess.Popen([sys.executable, "-c", code, str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                text=True, env=os.environ) for _ in range(3)]
    assert [process.stdout.readline() for process in several] == ["ready\n"] * 3
    for process in several:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in several] == ["7\n"] * 3
    assert len(built(tmp_path)) == 1
