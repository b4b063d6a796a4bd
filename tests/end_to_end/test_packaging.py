"""The README's steps from the wheel, in an empty folder that holds files which are named like modules of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOREIGN = ("analysis", "lm_eval", "datasets", "search")
"""Names of modules that a user may give a file; each of these raises."""


def folder_with_foreign_modules(folder: Path) -> Path:
    for name in FOREIGN:
        (folder / f"{name}.py").write_text("raise RuntimeError('a file of the user stood for a module of ours')")
    return folder


def run(folder: Path, site: Path, *arguments: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "RAYSEARCH_CACHE": str(folder / "cache")}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run([sys.executable, "-m", "raysearch", *arguments], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=timeout_s)


def test_a_module_of_the_users_stands_for_none_of_ours(tmp_path: Path) -> None:
    done = run(folder_with_foreign_modules(tmp_path), ROOT, "results", "nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "no such study directory" in done.stderr


@pytest.mark.slow
def test_the_readmes_own_model_from_the_wheel(tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    wheel = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT))
    subprocess.run([sys.executable, "-m", "pip", *wheel], check=True, cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    install = ("install", "--quiet", "--no-deps", "--target", str(site), str(built))
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    assert (site / "analysis" / "notebooks" / "pareto_report.ipynb").is_file()
    folder_with_foreign_modules(folder)
    steps = [
        ["pretrain", "--preset", "tiny", "--steps", "120", "--out", "models/mine"],
        ["prune", "models/mine", "--sparsity", "0.5", "--out", "pruned"],
        ["space", "--new", "search_spaces.mine"],
        ["plan", "search_spaces.mine"],
        ["sweep", "search_spaces.mine", "--out", "studies/mine", "--trials", "2"],
        ["results", "studies/mine", "--frontier"],
        ["report", "studies/mine"],
        ["notebook", "studies/mine"],
        ["pick", "studies/mine", "--max-drop", "text/bits_per_byte=9", "--max-bytes", "40MB"],
        ["export", "studies/mine/pick.json", "--out", "deploy"],
        ["verify", "deploy", "--limit", "5"],
        ["generate", "deploy", "Once upon a time", "--max-new-tokens", "5"],
        ["evaluate", "deploy", "--tasks", "text, last_word", "--limit", "5"],
    ]
    for step in steps:
        done = run(folder, site, *step)
        assert done.returncode == 0, (step, done.stdout[-2000:], done.stderr[-2000:])
        if step[0] == "space":  # and a smaller model's study, to be quick
            file = folder / "search_spaces" / "mine.py"
            file.write_text(file.read_text().replace('"epoch_tokens": 16_384', '"epoch_tokens": 2048'))
    assert "already" in run(folder, site, "space", "--new", "search_spaces.mine").stderr
