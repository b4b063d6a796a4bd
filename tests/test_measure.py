"""`raysearch measure`: what is cut is faster to serve, the numbers stay in the study, and a pick may ask for them."""

import json
from pathlib import Path

import pytest
from commands import Run

from analysis.load import load
from raysearch.measure import measure
from raysearch.study.ledger import Ledger


@pytest.fixture(scope="module")
def pruned_study(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, stories: Path) -> Path:
    from raysearch.prune import run_prune

    out = tmp_path_factory.mktemp("measured") / "out"
    run_prune({"model": str(tiny_model), "corpus": str(stories), "context_tokens": 64, "batch_tokens": 256, "num_items": 5,
               "tasks": ("text",)}, {"criterion": "l2", "pattern": "neuron", "scope": "layer", "uniform": True,
                                     "target_sparsity": 0.5}, out, str)
    return out


def test_the_frontier_is_measured_once_and_shown(run: Run, pruned_study: Path) -> None:
    command = ("measure", pruned_study, "--prompt-tokens", 24, "--new-tokens", 8, "--batch-sequences", 2)
    code, out, err = run(*command)
    assert code == 0, err
    assert "8,320 parameters cut out: scoring" in out  # 2 layers, 64 of 128 neurons, 2 * 32 + 1 each
    assert "2 candidates timed" in out
    ledger = Ledger(pruned_study)
    (trial,) = ledger.trials()
    speed = ledger.speeds()[trial.keys[-1]]
    assert speed.serving.model_dump() == {"batch_sequences": 2, "prompt_tokens": 24, "new_tokens": 8}
    assert speed.dense.resident_bytes - speed.served.resident_bytes == 4 * 8320
    code, out, err = run(*command)
    assert (code, "0 candidates timed" in out) == (0, True)
    frame = load(pruned_study).set_index("round")
    assert frame.loc[1, ["scoring_tokens_per_s", "decode_ms", "served_bytes"]].tolist() == [
        *speed.served.model_dump().values()]
    assert frame["decode_ms"].notna().all()
    assert "decode ms" in run("results", pruned_study)[1]


def test_a_pick_may_ask_for_speed(run: Run, pruned_study: Path) -> None:
    measure(str(pruned_study), {"prompt_tokens": 24, "new_tokens": 8, "batch_sequences": 2}, str)
    speed = Ledger(pruned_study).speeds()[Ledger(pruned_study).trials()[0].keys[-1]].served
    code, out, err = run("pick", pruned_study, "--max-ms", 1000, "--min-tokens-per-s", 1, "--max-resident", "1GB")
    assert code == 0, err
    picked = json.loads((pruned_study / "pick.json").read_text())
    assert picked["decode_ms"] == speed.decode_ms
    assert f"--max-ms 1000: {speed.decode_ms:.4g}, margin" in out
    for option, limit, rule in (("--max-ms", speed.decode_ms / 2, "ms too many"), ("--max-resident", "1kB", "bytes too many"),
                                ("--min-tokens-per-s", speed.scoring_tokens_per_s * 2, "tokens/s too few")):
        code, out, err = run("pick", pruned_study, option, limit)
        assert (code, rule in err) == (2, True), err


def test_what_cannot_be_measured_is_refused(run: Run, pruned_study: Path, tiny_model: Path, tmp_path: Path) -> None:
    code, out, err = run("measure", pruned_study, "--prompt-tokens", 60)
    assert (code, "prompt_tokens and new_tokens must be at most 64 together" in err) == (2, True), err
    assert run("prune", tiny_model, "--out", "plain", "--sparsity", 0.5)[0] == 0
    code, out, err = run("measure", "plain")
    assert (code, "has no scored candidate, so there is nothing to measure; run its sweep first" in err) == (2, True), err
    (Ledger(pruned_study).speed_path(Ledger(pruned_study).trials()[0].keys[-1])).unlink(missing_ok=True)
    code, out, err = run("pick", pruned_study, "--max-ms", 5)
    assert (code, f"no candidate's speed was measured; raysearch measure {pruned_study}" in err) == (2, True), err
    with Ledger(pruned_study).lock():
        code, out, err = run("measure", pruned_study)
    assert (code, "another driver runs this study" in err) == (2, True), err
