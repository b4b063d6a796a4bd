"""What a search space draws, in words: parameters, when each occurs, and configurations resolved to rounds."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from raysearch.config import Action, Study, TrialConfig
from raysearch.search.space import NUM_PROPOSALS, Space, draw
from raysearch.units import human_count

NUM_SHOWN = 10
MAX_RANGES = 3
"""Distributions of one parameter that are listed; one with more depends on what was drawn before it."""


class Drawn(NamedTuple):
    parameters: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    config: TrialConfig
    actions: tuple[Action, ...]


def draws(study: Study, space: Space, num_draws: int = NUM_PROPOSALS) -> list[Drawn]:
    """Random ones, each different in its parameters; ValueError of one sentence for one that contradicts itself. Where the
    study says no `epoch_tokens`, an epoch is 1,000 steps: the corpus is not read."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    asked = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [asked.ask() for _ in range(num_draws)]
    configs = [draw(space, trial) for trial in trials]
    from raysearch.search.forks import check_rule
    from raysearch.trial.actions import resolve_actions  # torch, a second: after what the space itself may have wrong

    num_train_tokens = 0
    if study.data.corpus is not None:
        num_train_tokens = study.data.epoch_tokens or 1000 * study.training.batch_tokens
    known = {}
    for trial, config in zip(trials, configs):
        actions = resolve_actions(config, study, num_train_tokens)
        known.setdefault(str(trial.params), Drawn(trial.params, trial.distributions, config, actions))
    rule = check_rule(study, space, num_train_tokens)
    if os.path.isdir(study.model.path):
        from raysearch.trial.parts import check_parts  # seconds

        check_parts([*rule, *configs], study)
    return list(known.values())


def describe_space(study: Study, drawn: Sequence[Drawn], weights: tuple[int, int] | None) -> str:
    """`weights`: all of the model's and the prunable ones, where the model is there."""
    names = list(dict.fromkeys(name for one in drawn for name in one.parameters))
    width = max(map(len, names), default=0)
    lines = ["parameters", *(f"  {name:<{width}}  {_ranges(name, drawn)}{_when(name, names, drawn)}" for name in names)]
    if not names:
        lines.append("  none: every trial is the same")
    num_different = len({one.actions for one in drawn})
    lines += ["", f"{min(NUM_SHOWN, len(drawn))} configurations (of {num_different} different ones in {NUM_PROPOSALS} draws)"]
    for one in drawn[:NUM_SHOWN]:
        lines += [f"  {', '.join(f'{name} {_value(value)}' for name, value in one.parameters.items())}",
                  *(f"    round {number}: {_round(action, study, weights)}" for number, action in enumerate(one.actions, 1))]
    means = [sum(action.finetune_tokens for action in one.actions) for one in drawn]
    lines += ["", f"a trial has {_span([len(one.actions) for one in drawn])} rounds and trains on {_span(means)} tokens"]
    if study.data.epoch_tokens is None and any(means):
        lines.append("(epoch_tokens is not set, so that an epoch is the corpus; it is taken as "
                     f"{1000 * study.training.batch_tokens:,} tokens here)")
    return "\n".join(lines)


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ranges(name: str, drawn: Sequence[Drawn]) -> str:
    ranges = dict.fromkeys(_range(one.distributions[name]) for one in drawn if name in one.distributions)
    return ", or ".join(ranges) if len(ranges) <= MAX_RANGES else "a range that depends on what was drawn before"


def _range(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(_value, distribution.choices))
    step = f", in steps of {distribution.step:g}" if distribution.step not in (None, 1) else ""
    return f"{_value(distribution.low)} to {_value(distribution.high)}{step}{', log' if distribution.log else ''}"


def _when(name: str, names: Sequence[str], drawn: Sequence[Drawn]) -> str:
    """Upon which earlier parameter it depends whether this one occurs, in words; "" where it always does."""
    num_with = sum(name in one.parameters for one in drawn)
    if num_with == len(drawn):
        return ""
    for other in names[:names.index(name)]:
        sides = [{one.parameters[other] for one in drawn if other in one.parameters and (name in one.parameters) == occurs}
                 for occurs in (True, False)]
        always_there = all(other in one.parameters for one in drawn if name in one.parameters)
        if always_there and sides[0] and not sides[0] & sides[1] and len(sides[0]) <= 6:
            return f"   where {other} is {' or '.join(sorted(map(_value, sides[0])))}"
    return f"   in {num_with / len(drawn):.0%} of the draws"


def _round(action: Action, study: Study, weights: tuple[int, int] | None) -> str:
    unit = " std" if action.threshold_unit == "std" else ""
    cut = f"threshold {action.threshold:.4g}{unit}" if action.threshold is not None else f"sparsity {action.sparsity:.4f}"
    of_weights = action.pattern == "unstructured" or ":" in action.pattern  # a head's share is of the heads
    if action.sparsity is not None and of_weights and weights is not None:
        cut += f", {human_count(weights[0] - action.sparsity * weights[1])} of {human_count(weights[0])} parameters"
    method = "" if action.criterion == "magnitude" else f"{action.criterion}, "
    pattern = "" if action.pattern == "unstructured" else f"{action.pattern}, "
    steps = action.finetune_tokens // study.training.batch_tokens
    return f"{method}{pattern}{cut}, " + (f"{action.finetune_tokens:,} tokens in {steps:,} steps" if steps else "no training")
