"""`raysearch add`: models of another origin beside a study's frontier."""

import re
import shutil
from pathlib import Path

import pytest
import small_study
from commands import Run
from safetensors.torch import load_file, save_file

from analysis.candidates import candidates, frontier
from analysis.load import load
from analysis.plots import frontier_figure, trajectory_figure
from raysearch.add import tensor_bytes
from raysearch.config import Study
from raysearch.trial.worker import Worker


@pytest.fixture
def directory(study: Study, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of one trial."""
    small_study.sweep(tmp_path / "study", study.replaced(num_trials=1), worker, monkeypatch, lambda line: None)
    return tmp_path / "study"


def test_a_model_is_scored_as_the_studys_own(directory: Path, tiny_model: Path, tmp_path: Path, run: Run) -> None:
    """A copy of the dense model scores what the dense baseline does; another one is found to differ."""
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.weight"] *= 0
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert run("pick", directory, "--max-nonzero", "1B", "--out", tmp_path / "pick.json")[0] == 0
    assert run("export", tmp_path / "pick.json", "--out", tmp_path / "sparse", "--format", "sparse")[0] == 0
    before = load(directory)
    for name, folder in (("copy", tiny_model), ("half", other), ("ours", tmp_path / "sparse")):
        code, out, err = run("add", directory, folder, "--name", name)
        assert code == 0, err
        assert f"other-{name}: raysearch compare " in out
    frame = load(directory)
    assert frame.attrs["damage"] == before.attrs["damage"] == ()
    rows = frame[frame["status"] == "other"].set_index("key")
    assert list(rows.index) == ["other-copy", "other-half", "other-ours"]
    dense, picked = frame[frame["status"] == "dense"].iloc[0], frame[frame["trial"] == 0].iloc[-1]
    for column in ("selection/text/bits_per_byte", "report/last_word/perplexity", "report/text/bits_per_byte"):
        assert rows.loc["other-copy", column] == pytest.approx(dense[column], rel=1e-5)
        assert rows.loc["other-half", column] != pytest.approx(dense[column], rel=1e-3)
        if column.startswith("report"):
            assert rows.loc["other-ours", column] == pytest.approx(picked[column], rel=1e-4)
    assert rows.loc["other-copy", "num_nonzero"] == dense["num_nonzero"]
    assert rows.loc["other-copy", "stored_bytes"] == dense["resident_bytes"] == tensor_bytes(tiny_model)
    assert rows.loc["other-ours", "stored_bytes"] == picked["stored_bytes"]
    assert len(candidates(frame)) == len(candidates(before))
    assert frontier(frame)["key"].tolist() == frontier(before)["key"].tolist()
    drawn = {trace.name for trace in frontier_figure(frame, "selection").data}
    assert {"copy", "half", "ours"} <= drawn
    assert len(trajectory_figure(frame).data) == len(trajectory_figure(before).data)
    code, out, err = run("compare", directory, "dense", "other-half")
    assert (code, "needs items of at least 4 documents for an error, got those of 1" in err) == (2, True)  # both were found
    assert "added: half" in run("results", directory)[1]
    shutil.rmtree(other)
    code, out, err = run("measure", directory, "--prompt-tokens", 24, "--new-tokens", 4, "--batch-sequences", 2)
    assert code == 0, err
    assert "other-copy, as it is: scoring" in out
    assert re.search(r"other-half is left out, for it cannot be opened: .*no such folder", out)
    frame = load(directory)
    timed = frame[frame["decode_of_dense"].notna()]
    assert {*timed["key"]} >= {dense["key"], "other-copy", "other-ours"}
    assert "other-half" not in {*timed["key"]}
    run("report", directory, "--out", tmp_path / "r.html")
    assert "added: half" in (tmp_path / "r.html").read_text()


def test_what_cannot_be_added_is_one_sentence(directory: Path, tiny_model: Path, tmp_path: Path, run: Run) -> None:
    assert "--name must be letters" in run("add", directory, tiny_model, "--name", "a/b")[2]
    assert "no such folder" in run("add", directory, tmp_path / "none", "--name", "a")[2]
    (tmp_path / "empty").mkdir()
    code, _, err = run("add", directory, tmp_path / "empty", "--name", "a")
    assert (code, err.count("\n")) == (2, 1), err
    assert not (directory / "others").exists()
