"""`raysearch plan`: counts by hand, a real calibration of the tiny model, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raysearch.config import Action, study_of
from raysearch.plan import Calibration, Plan, describe_plan, distinct_rounds, rank_seconds, with_forks

CALIBRATION = Calibration(device="a processor", on_gpu=False, start_s=3.0, step_s=0.5, prune_s=0.25, evaluate_s=2.0,
                          num_steps=4, num_items=12, candidate_bytes=1_000_000, sparsity=0.5)
SETTINGS = {"model": "m", "num_trials": 2, "max_concurrent": 3, "num_ranks": 2, "zero_stage": 1, "context_tokens": 64,
            "batch_tokens": 256}


def trial(*sparsities: float) -> tuple[Action, ...]:
    return tuple(Action(sparsity=s, finetune_tokens=2560, data_start_tokens=2560 * i) for i, s in enumerate(sparsities))


def plan(directory: Path, trials: list[tuple[Action, ...]], **settings: object) -> Plan:
    return Plan(study_of(**{**SETTINGS, **settings}), "space", directory, trials, "root", CALIBRATION)


def test_shared_prefixes_are_counted_once() -> None:
    assert len(distinct_rounds("root", [trial(0.1, 0.3), trial(0.1, 0.3, 0.5), trial(0.3, 0.5)])) == 5


def test_after_the_first_trials_of_a_study_each_is_one_round() -> None:
    lengths = [len(actions) for actions in with_forks([(Action(sparsity=0.5), Action(sparsity=0.7))] * 12, 6)]
    assert lengths == [2, 2, 2, 2, 1, 1] * 2


def test_a_rounds_price_is_its_ranks_busy_time() -> None:
    study = study_of(**SETTINGS)
    (action,) = trial(0.5)
    assert rank_seconds(action, study, CALIBRATION) == pytest.approx(2 * (0.25 + 10 * 0.5) + 2.0)


def test_the_text_adds_up(tmp_path: Path) -> None:
    # two studies of two trials: 3 distinct rounds of 4, and 4 of 4, and a control of 2 rounds each; a round costs 12.5 s, the
    # dense baseline 2 s
    text = describe_plan(plan(tmp_path, [trial(0.1, 0.3), trial(0.1, 0.5), trial(0.1, 0.2), trial(0.3, 0.4)]))
    assert "rounds      2.0 per trial (2 to 2, 4 random draws)\n" in text
    assert "4 in all, of which 0.5 are shared prefixes, run once; 2.0 of the dense control beside them\n" in text
    assert "at most 2 trials: 0 GPU and 4 CPU" in text
    low, high = (2 + 5 * 12.5) / 3600, (2 + 6 * 12.5) / 3600
    assert f"{(low + high) / 2:.3g} CPU-hours ({low:.3g} to {high:.3g})" in text
    assert "5.5 MB of disk" in text
    assert "NOT on a GPU" not in text
    without = describe_plan(plan(tmp_path, [trial(0.1, 0.3), trial(0.1, 0.5)], dense_control=False))
    assert f"{(2 + 3 * 12.5) / 3600:.3g} CPU-hours" in without


def test_a_study_for_gpus_that_was_measured_on_a_processor_says_so(tmp_path: Path) -> None:
    text = describe_plan(plan(tmp_path, [trial(0.5), trial(0.6)], gpus_per_rank=1.0))
    assert "NOT on a GPU as the study asks" in text
    assert "GPU-hours" in text
    assert "at most 2 trials: 4 GPU" in text


def test_the_command_measures_and_writes_nothing(tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    (tmp_path / "space.py").write_text(
        f"STUDY = {{'model': {{'path': {str(tiny_model)!r}}},\n"
        f"         'data': {{'corpus': {str(stories)!r}, 'context_tokens': 64, 'epoch_tokens': 1024}},\n"
        "         'training': {'batch_tokens': 256}, 'evaluation': {'tasks': ('text', 'last_word')},\n"
        "         'search': {'num_trials': 4}, 'cluster': {'num_ranks': 'auto', 'zero_stage': 'auto'}}\n\n\n"
        "def space(trial):\n"
        "    return {'schedule': 'linear', 'num_rounds': trial.suggest_int('num_rounds', 1, 3),\n"
        "            'finetune_epochs': 1.0, 'target_sparsity': 0.5}\n")
    environment = {**os.environ, "RAYSEARCH_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "raysearch", "plan", "space", "--out", "out"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "placement   on processors auto is one rank at ZeRO-0" in done.stdout
    assert "(1 to 3, 200 random draws)" in done.stdout
    assert f"writes to   {tmp_path / 'out'}:\n" in done.stdout
    assert "step of 256 tokens 0.000 s" not in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("__")) == ["cache", "space.py"]


def test_a_space_that_contradicts_itself_is_one_sentence(tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    (tmp_path / "space.py").write_text(
        f"STUDY = {{'model': {{'path': {str(tiny_model)!r}}},\n"
        f"         'data': {{'corpus': {str(stories)!r}, 'context_tokens': 64}}}}\n\n\n"
        "def space(trial):\n    return {'threshold': 0.1, 'target_sparsity': 0.5}\n")
    environment = {**os.environ, "RAYSEARCH_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-m", "raysearch", "plan", "space"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "threshold and target_sparsity contradict each other" in done.stderr
