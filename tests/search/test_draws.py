"""What `raysearch space` says of a space."""

from typing import Any

import optuna
import pytest

from raysearch.config import study_of
from raysearch.search.draws import describe_space, draws
from raysearch.search.space import load_space

STUDY = study_of(path="m", epoch_tokens=4096, batch_tokens=1024)


def conditional(trial: optuna.Trial) -> dict[str, Any]:
    """Conditions on a choice and on a number, one inside another, and one on two at once."""
    fields: dict[str, Any] = {"finetune_epochs": trial.suggest_categorical("finetune_epochs", [0.0, 0.5, 1.0])}
    if fields["finetune_epochs"]:
        fields["learning_rate"] = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
        if fields["finetune_epochs"] == 1.0:
            fields["l1_lambda"] = trial.suggest_float("l1_lambda", 0.0, 1e-3, step=1e-4)
    rounds = trial.suggest_int("num_rounds", 1, 4)
    if rounds > 2 and fields["finetune_epochs"]:
        fields["scope"] = trial.suggest_categorical("scope", ["global", "layer"])
    target = trial.suggest_float("target_sparsity", 0.5, 0.9)
    return fields | {"schedule": "linear", "num_rounds": rounds, "target_sparsity": target,
                     "initial_sparsity": trial.suggest_float("initial_sparsity", 0.0, target)}


def test_parameters_and_when_each_occurs() -> None:
    lines = [line.strip() for line in describe_space(STUDY, draws(STUDY, conditional), None).splitlines()]
    assert "finetune_epochs   0, 0.5, 1" in lines
    assert "learning_rate     0.0001 to 0.01, log   where finetune_epochs is 0.5 or 1" in lines
    assert "l1_lambda         0 to 0.001, in steps of 0.0001   where finetune_epochs is 1" in lines
    assert "num_rounds        1 to 4" in lines
    assert any(line.startswith("scope             global, layer   in ") for line in lines)
    assert "initial_sparsity  a range that depends on what was drawn before" in lines


def test_ten_configurations_are_resolved_with_sizes_and_tokens() -> None:
    drawn = draws(STUDY, conditional)
    text = describe_space(STUDY, drawn, (1_000_000, 800_000))
    assert text.count("    round 1: ") == 10
    assert text.count("    round ") == sum(len(one.actions) for one in drawn[:10])
    last = drawn[0].actions[-1]
    assert f"sparsity {last.sparsity:.4f}, {1000 - 800 * last.sparsity:.3g}k of 1M parameters, " in text
    assert "a trial has 1 to 4 rounds and trains on 0 to 16,384 tokens" in text


def test_a_space_without_parameters_and_one_of_few_configurations() -> None:
    text = describe_space(STUDY, draws(STUDY, lambda trial: {"target_sparsity": 0.5}), None)
    assert "none: every trial is the same" in text
    assert "1 configurations (of 1 different ones" in text
    assert "round 1: sparsity 0.5000, no training" in text
    few = draws(STUDY, lambda trial: {"target_sparsity": trial.suggest_categorical("s", [0.1, 0.2])})
    assert len(few) == 2


@pytest.mark.parametrize("field", ["target_sparsity", "sparsity"])
def test_a_draw_that_contradicts_itself_is_one_sentence(field: str) -> None:
    def rarely(trial: optuna.Trial) -> dict[str, Any]:
        wrong = trial.suggest_int("x", 1, 50) == 50
        return {field: 2.0} if wrong else {"target_sparsity": 0.5}

    with pytest.raises(ValueError, match=f"space\\(trial\\): {field}: "):
        draws(STUDY, rarely)


@pytest.mark.parametrize("name", ["demo", "gpt2_small", "books_30m", "all_methods"])
def test_every_space_of_ours_is_described(name: str) -> None:
    study, space = load_space(f"search_spaces.{name}")
    text = describe_space(study, draws(study, space), None)
    assert text.startswith("parameters\n  ")
    assert "tokens in " in text
