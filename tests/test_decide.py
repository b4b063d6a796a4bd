"""The commands on a study, as a user types them."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Run
from synthetic_study import SyntheticStudy


@pytest.fixture
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], None]]:
    """Call it: the system refuses every write into the folder."""
    mounted = []

    def refuse(folder: Path) -> None:
        if subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        mounted.append(folder)

    yield refuse
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_of_a_read_only_study_everything_can_be_had(run: Run, tmp_path: Path, read_only: Callable[[Path], None]) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.5], report=True)
    read_only(tmp_path / "study")
    advice = "cannot be written (Read-only file system); give a place with --out that can be"
    pick = ("pick", "study", "--max-bytes", "1GB")
    for command, name in ((("report", "study"), "report.html"), (pick, "pick.json")):
        assert run(*command) == (2, "", f"raysearch: {tmp_path}/study/{name}: {advice}\n")
        assert run(*command, "--out", name)[0] == 0
    for command in ("results", "status"):
        assert run(command, "study")[0] == 0
