"""`raysearch evaluate` on dense, pruned and compressed models."""

import json
import time
from pathlib import Path

import pytest
from commands import Run


def evaluated(run: Run, *command: object) -> tuple[dict, str]:
    """(what --json prints, stderr)."""
    code, out, err = run("evaluate", *command, "--json")
    assert code == 0, err
    return json.loads(out), err


def test_evaluate_runs_a_pruned_model_on_sparse_kernels(run: Run, tiny_model: Path, tmp_path: Path, stories: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    assert run("prune", tiny_model, "--out", "pruned", "--sparsity", 0.95, "--prunable", "matrices")[0] == 0
    common = ("--tasks", "text", "--corpus", stories, "--limit", 4)
    auto, err = evaluated(run, "pruned/model", *common)
    lines = [line for line in err.splitlines() if line.startswith("kernels: ")]
    assert len(lines) == 1, err
    (num_tokens, used), = auto["kernels"].items()
    assert num_tokens == "1024"
    assert sum(used["layers"].values()) == 8
    assert (used["model_ratio"] > 1) == any(name != "dense" for name in used["layers"])
    assert "8 sparse layers" in lines[0]
    assert f"at 1024 tokens, the model {used['model_ratio']:.2f} times as fast as dense" in lines[0]
    plain, err = evaluated(run, "pruned/model", *common, "--backend", "dense")
    assert (plain["kernels"], "kernels:" in err) == ({}, False)
    assert auto["results"]["text"]["bits_per_byte"] == pytest.approx(plain["results"]["text"]["bits_per_byte"], rel=1e-5)
    code, _, err = run("evaluate", "pruned/model", *common, "--backend", "sparse")
    assert (code, err.strip().splitlines()[-1].endswith("backend must be auto or dense, got 'sparse'")) == (2, True)


def test_evaluate_times_nothing_for_a_model_that_is_not_sparse(run: Run, tiny_model: Path, stories: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.evaluate.sparsify_for_inference", None)
    monkeypatch.setattr("raysearch.evaluate.worth_timing", None)
    found, err = evaluated(run, tiny_model, "--tasks", "text", "--corpus", stories, "--limit", 2)
    assert (found["kernels"], "kernels:" in err) == ({}, False)


def test_an_unknown_task_is_answered_within_seconds(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    start = time.process_time()
    code, out, err = run("evaluate", tiny_model, "--tasks", "hellaswagg")
    assert time.process_time() - start < 5  # lm-eval's index alone takes 7 to 13
    assert (code, out) == (2, "")
    assert err.startswith("raysearch: task 'hellaswagg' is not known; the nearest names are hellaswag, ")
