"""Forks: single rounds on stored candidates, learned by how far below or above the frontier they come out.

A round is a step from a state, so a search may go on from the best candidate of any size with another rate, criterion,
learning rate or epochs than made it: it finds schedules that no fixed formula writes. The parent is the frontier's candidate
that is nearest to a random sparsity; the step is what Optuna's TPE has learned to end below the frontier.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray

from raysearch.config import SIZES, Action, Study, is_maximised, parse
from raysearch.search.space import Space, draw, in_space
from raysearch.study.records import RoundRecord, objective_values
from raysearch.trial.actions import check_actions, resolve_actions

NUM_DRAWS = 100
"""Random configurations of the space, from which its reach is taken."""
DIVERGED = 1.0
"""What the sampler hears of a fork that diverged: a model that lies above the frontier by all that the dense one has."""
ROUNDING = 1e-3
"""Sparsities that are this close are the same one: a model has only so many weights."""

EMPTY: Mapping[str, float] = MappingProxyType({})
RoundRule = Callable[[Any, RoundRecord], dict[str, Any]]


class Parent(NamedTuple):
    record: RoundRecord
    actions: tuple[Action, ...]
    """From the dense model."""
    num_tokens: int
    """On which it was trained so far."""


class Reach(NamedTuple):
    """Of what a space proposes."""

    sparsity: dict[str, float]
    """The largest, by pattern."""
    num_tokens: int
    """Of the trial that trains longest."""


class Forks:
    """Asks for rounds on candidates that were observed, and hears how they ended."""

    def __init__(self, study: Study, space: Space, num_train_tokens: int, seed: int) -> None:
        self.study, self.space, self.num_train_tokens = study, space, num_train_tokens
        self.rule: RoundRule | None = getattr(inspect.getmodule(space), "round", None)
        """`round(trial, parent) -> action fields` of the space's module, where it has one."""
        self.learner = optuna.create_study(sampler=optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, n_startup_trials=8))
        self.frontier: list[Parent] = []
        self._losses = np.empty((0, len(study.search.objectives)))
        """Theirs, lower is better, each over the first candidate's (the dense baseline's): (n, d)."""
        self._scale: NDArray[np.float64] | None = None
        self._chance = np.random.default_rng(seed)
        self._number_of: dict[int, int] = {}
        """Trial -> its number in the learner's study, until it is told."""

    def observe(self, record: RoundRecord, actions: tuple[Action, ...], missed: Mapping[str, float] = EMPTY) -> float | None:
        """A candidate and its way from the dense model; how far above the frontier of before it lies (additive epsilon
        indicator, Zitzler et al. 2003, eq. 5: by so much all its objectives must improve to be on it), negative below it.
        None for the first one, and for one that lacks an objective. One whose scoring a race ended is not on it, nor one
        whose quality is too low; by what it misses of its constraints (`violations`) it counts as further above."""
        objectives = self.study.search.objectives
        values = objective_values(record, objectives)
        if values is None or not np.isfinite(values).all():
            return None
        losses = np.array([-value if is_maximised(name) else value for name, value in zip(objectives, values)])
        if self._scale is None:
            self._scale = np.where(losses == 0, 1.0, np.abs(losses))
        losses, others = losses / self._scale, self._losses
        is_useless = record.dominated_by is not None or any(by > 0 for name, by in missed.items() if name not in SIZES)
        if not is_useless and not (others <= losses).all(axis=1).any():
            stay = ~(losses <= others).all(axis=1)
            self.frontier = [*(parent for parent, stays in zip(self.frontier, stay) if stays),
                             Parent(record, actions, sum(action.finetune_tokens for action in actions))]
            self._losses = np.vstack([others[stay], losses])
        too_much = max(0.0, *missed.values()) if missed else 0.0
        return float((losses - others).min(axis=1).max()) + too_much if len(others) else None

    def ask(self, number: int) -> tuple[optuna.Trial, Parent]:
        """What the learner is asked for trial `number`, and where it is to start: nearest to a sparsity between 0 and what the
        space reaches, so that the frontier's end is tried often while it is not there yet. No chain trains longer than the
        longest of the space's trials and one round: a control is as long, and what is lost takes as long."""
        trial = self.learner.ask()
        self._number_of[number] = trial.number
        sparsities = np.array([parent.record.sparsity for parent in self.frontier])
        wanted = self._chance.uniform(0, max(sparsities.max(), *self.reach.sparsity.values()))
        is_short = np.array([parent.num_tokens < self.reach.num_tokens or not parent.num_tokens for parent in self.frontier])
        return trial, self.frontier[int(np.where(is_short, np.abs(sparsities - wanted), np.inf).argmin())]

    def action(self, trial: Any, parent: Parent) -> Action:
        """What the space's `round`, or else its `space`, makes of the trial; ValueError of one sentence.

        Of a configuration the first round is taken, and where it cuts by a threshold the last: the sparsity is a fraction of
        what the parent has left, and at most what the space reaches."""
        start = {"data_start_tokens": parent.num_tokens}
        if self.rule is not None:
            try:
                fields = self.rule(trial, parent.record)
            except Exception as error:
                raise ValueError(f"round(trial, parent): {in_space(error)}") from error
            if not isinstance(fields, dict):
                raise ValueError(f"round(trial, parent) must return a dict of an action's fields, got {type(fields).__name__}")
            trains = {**start, "seed": self.study.data.seed} if fields.get("finetune_tokens") else {}
            action = parse(Action, {**trains, **fields}, "round(trial, parent)")
            check_actions([action], self.study, self.num_train_tokens, "round(trial, parent)")
            return action
        actions = resolve_actions(draw(self.space, trial), self.study, self.num_train_tokens)
        action = actions[0] if actions[0].threshold is None else actions[-1]
        if action.sparsity is not None:
            before = sparsity_before(parent, action.pattern)
            most = max(before, self.reach.sparsity.get(action.pattern, 0.0))
            action = action.model_copy(update={"sparsity": min(round(1 - (1 - before) * (1 - action.sparsity), 12), most)})
        return action.model_copy(update=start) if action.finetune_tokens else action

    @cached_property
    def reach(self) -> Reach:
        """From random configurations, and from the same with all numbers at their largest."""
        chance, sparsity, num_tokens = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), {}, 0
        for _ in range(NUM_DRAWS):
            trial: Any = chance.ask()
            for _ in range(2):
                with contextlib.suppress(ValueError):  # the search tells it where it happens
                    actions = resolve_actions(draw(self.space, trial), self.study, self.num_train_tokens)
                    num_tokens = max(num_tokens, sum(action.finetune_tokens for action in actions))
                    last = actions[-1]
                    sparsity[last.pattern] = max(sparsity.get(last.pattern, 0.0), last.sparsity or 0.0)
                trial = optuna.trial.FixedTrial({name: getattr(each, "high", trial.params[name])
                                                 for name, each in trial.distributions.items()})
        return Reach(sparsity, num_tokens)

    def tell(self, number: int, above: float | None) -> None:
        """The end of fork `number`; None where it says nothing about its parameters. What was told already is not again."""
        if (asked := self._number_of.pop(number, None)) is not None:
            state = optuna.trial.TrialState.FAIL if above is None else optuna.trial.TrialState.COMPLETE
            self.learner.tell(asked, above, state=state)

    def recall(self, number: int, parameters: dict[str, Any],
               distributions: dict[str, optuna.distributions.BaseDistribution]) -> None:
        """A fork of an earlier sweep, as if it had just been asked."""
        self._number_of[number] = len(self.learner.get_trials(deepcopy=False))
        self.learner.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, params=parameters,
                                                         distributions=distributions))


def sparsity_before(parent: Parent, pattern: str) -> float:
    """Of the weights of this pattern: what the last action that names it left, or what the model has."""
    named = [action.sparsity for action in parent.actions if action.pattern == pattern and action.sparsity is not None]
    if pattern != "unstructured":
        return named[-1] if named else 0.0
    sparsity = parent.record.sparsity
    return named[-1] if named and abs(named[-1] - sparsity) < ROUNDING else sparsity
