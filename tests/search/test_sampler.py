"""What is asked of Optuna and what it hears, on a real study in memory."""

import json
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from synthetic_study import PROVENANCE, ROOT, metrics

from raysearch.config import TrialConfig, study_of
from raysearch.search.sampler import Sampler
from raysearch.study.records import RoundRecord, TrialRecord

STUDY = study_of(path="m")


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {"target_sparsity": trial.suggest_float("target_sparsity", 0.1, 0.9)}


def candidate(key: str, sparsity: float, depth: int) -> RoundRecord:
    return RoundRecord(
        key=key, parent=None, action=None, depth=depth, num_parameters=100, num_prunable=80,
        num_nonzero=100 - int(80 * sparsity), sparsity=sparsity, model_sparsity=0.8 * sparsity, layer_sparsity={},
        stored_bytes=400, resident_bytes=400,
        metrics=metrics(sparsity, 0.0), train_loss=None, prune_s=0.0, finetune_s=0.0, evaluate_s=0.0, weights_sha256=None,
        provenance=PROVENANCE)


def ended(number: int, status: str, keys: tuple[str, ...] = (), **changes: Any) -> TrialRecord:
    return TrialRecord(number=number, config=TrialConfig(target_sparsity=0.5), actions=(), keys=keys, status=status,
                       started_at="now", **changes)


@pytest.fixture
def sampler() -> Sampler:
    """One that knows the dense baseline."""
    made = Sampler(optuna.create_study(directions=["minimize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0)),
                   STUDY, space)
    made.observe(None, candidate(ROOT, 0.0, 0))
    return made


def test_trials_are_numbered_and_drawn_from_the_space(sampler: Sampler) -> None:
    asked = [sampler.ask() for _ in range(5)]
    assert [one.number for one in asked] == list(range(5)) == list(range(sampler.num_asked))
    drawn = [one.trial.target_sparsity for one in asked]
    assert [one.parameters for one in asked] == [{"target_sparsity": sparsity} for sparsity in drawn]
    assert all(json.loads(one.distributions["target_sparsity"])["name"] == "FloatDistribution" for one in asked)
    assert drawn == [trial.params["target_sparsity"] for trial in sampler.optuna_study.trials]
    assert len(set(drawn)) == 5
    assert all(0.1 <= sparsity <= 0.9 for sparsity in drawn)


def test_given_trials_come_in_their_order_after_those_that_began() -> None:
    given = [TrialConfig(target_sparsity=sparsity) for sparsity in (0.1, 0.2, 0.3)]
    sampler = Sampler(optuna.create_study(), STUDY, space, given, num_asked=1)
    assert [sampler.ask()[1] for _ in range(2)] == given[1:]


def test_a_space_that_fails_late_costs_that_trial_alone(sampler: Sampler) -> None:
    sampler.space = lambda trial: {"rate": 2.0} if trial.number == 1 else space(trial)
    asked = [sampler.ask() for _ in range(3)]
    assert [isinstance(one.trial, ValueError) for one in asked] == [False, True, False]
    sampler.observations.clear()  # also before the dense baseline is scored
    sampler.end(ended(1, "failed", reason=str(asked[1].trial), crashed=True))
    assert sampler.optuna_study.trials[1].state == TrialState.FAIL
    assert sampler.optuna_study.trials[1].user_attrs["reason"].startswith("space(trial): rate: Input should be less than 1")


def test_optuna_hears_the_last_round_of_a_trial(sampler: Sampler) -> None:
    number = sampler.ask().number
    for depth, (key, sparsity) in enumerate((("a", 0.25), ("b", 0.5)), start=1):
        sampler.observe(number, candidate(key, sparsity, depth))
    sampler.end(ended(number, "done", ("a", "b")))
    assert [(seen.depth, seen.values[0]) for seen in sampler.observations[number]] == [(1, 80.0), (2, 60.0)]
    (trial,) = sampler.optuna_study.trials
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [60.0, metrics(0.5, 0.0)["text/bits_per_byte"].value])
    assert trial.user_attrs["keys"] == ["a", "b"]
    assert sampler.optuna_study.best_trials == [trial]


def test_a_diverged_trial_is_complete_and_never_among_the_best(sampler: Sampler) -> None:
    for status in ("failed", "done"):
        number = sampler.ask().number
        sampler.end(ended(number, status, reason="round 1: the training loss became nan"))
    diverged, done = sampler.optuna_study.trials
    assert diverged.state == done.state == TrialState.COMPLETE
    assert diverged.values == done.values == [100.0, metrics(0.0, 0.0)["text/bits_per_byte"].value]  # round 0 of all
    assert diverged.user_attrs["reason"] == "round 1: the training loss became nan"
    assert sampler.optuna_study.best_trials == [done]


def test_a_crash_says_nothing_about_its_configuration(sampler: Sampler) -> None:
    sampler.end(ended(sampler.ask().number, "failed", reason="its process died", crashed=True))
    (trial,) = sampler.optuna_study.trials
    assert (trial.state, trial.values) == (TrialState.FAIL, None)
