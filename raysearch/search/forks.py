"""Forks: single rounds on stored candidates, the one of many that promises the most hypervolume.

A round is a step from a state, so a search may go on from the best candidate of any size with another rate, criterion,
learning rate or epochs than made it: it finds schedules that no fixed formula writes. A pool of random rounds on random
candidates of the frontier is drawn, a model of all rounds so far says what each would give, and the one with the largest
expected gain is taken (expected hypervolume improvement, Emmerich et al. 2006, by samples).
"""

import contextlib
import inspect
from collections.abc import Callable, Container, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import optuna

from raysearch.config import SIZES, Action, Metric, Study, is_maximised
from raysearch.frozen import parse
from raysearch.pruning.pareto import hypervolume, hypervolume_gains
from raysearch.search.round_model import Floats, RoundModel, Start, Step
from raysearch.search.space import Space, draw, in_space
from raysearch.study.records import Provenance, RoundRecord, gpu_seconds, objective_values
from raysearch.trial.actions import check_actions, resolve_actions

NUM_DRAWS = 100
"""Random configurations of the space, from which its reach is taken."""
POOL = 20
"""Random rounds of which the best is taken."""
NUM_SAMPLES = 8
"""Of the model's targets for each proposal; the same normal deviates for all."""
MIN_ROUNDS = 8
"""Seen, before a model is asked: until then a fork is any of the pool."""
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


class Fork(NamedTuple):
    trial: optuna.Trial
    """What was drawn."""
    parent: Parent
    action: Action | None
    error: ValueError | None = None
    """Why the space makes no action."""
    gain_per_gpu_hour: float | None = None
    """As in TrialRecord."""


class Forks:
    """Asks for rounds on candidates that were observed, and hears of all rounds, whoever made them."""

    def __init__(self, study: Study, space: Space, num_train_tokens: int, seed: int) -> None:
        self.study, self.space, self.num_train_tokens = study, space, num_train_tokens
        self.rule: RoundRule | None = getattr(inspect.getmodule(space), "round", None)
        """`round(trial, parent) -> action fields` of the space's module, where it has one."""
        self.frontier: list[Parent] = []
        self._losses = np.empty((0, len(study.search.objectives)))
        """Theirs, lower is better, each over the first candidate's (the dense baseline's): (n, d)."""
        self._scale: Floats | None = None
        self._starts: dict[tuple[Action, ...], Start] = {}
        self._steps: list[Step] = []
        self._targets: list[Floats] = []
        self._gpu_s: list[float] = []
        """Of each round that was seen."""
        self._expected: dict[int, Floats] = {}
        """By running fork, the losses that the model expects of it: (d,)."""
        self._model = RoundModel()
        self._chance, self._sampler = np.random.default_rng(seed), optuna.samplers.RandomSampler(seed=seed)

    def observe(self, record: RoundRecord, actions: tuple[Action, ...], missed: Mapping[str, float] = EMPTY) -> None:
        """A candidate, its way from the dense model, and what it misses of its constraints (`violations`). One whose scoring a
        race ended is not on the frontier, nor one whose quality is too low; what is too large is, to be pruned further."""
        objectives = self.study.search.objectives
        values = objective_values(record, objectives)
        if values is None or not np.isfinite(values).all():
            return
        losses = np.array([-value if is_maximised(name) else value for name, value in zip(objectives, values)])
        if self._scale is None:
            self._scale = np.where(losses == 0, 1.0, np.abs(losses))
        losses, others = losses / self._scale, self._losses
        is_whole = not self._targets or len(self._targets[0]) == len(losses) + len(missed)  # no metric is missing
        if actions and actions not in self._starts:
            self._gpu_s.append(gpu_seconds(record, self.study.cluster.gpus_per_rank))
            if actions[:-1] in self._starts and is_whole:
                self._learn(actions, np.array([*losses, *missed.values()]))
        self._starts[actions] = Start(record.sparsity, losses)
        is_useless = record.dominated_by is not None or any(by > 0 for name, by in missed.items() if name not in SIZES)
        if not is_useless and not (others <= losses).all(axis=1).any():
            stay = ~(losses <= others).all(axis=1)
            if not stay.all():
                self.frontier = [parent for parent, stays in zip(self.frontier, stay) if stays]
            self.frontier.append(Parent(record, actions, sum(action.finetune_tokens for action in actions)))
            self._losses = np.vstack([others[stay], losses])

    def _learn(self, actions: tuple[Action, ...], targets: Floats) -> None:
        self._steps.append((self._starts[actions[:-1]], actions[-1]))
        self._targets.append(targets)

    def diverged(self, actions: tuple[Action, ...]) -> None:
        """The last of these rounds did: it counts as no smaller than its parent, and as bad as the worst that was seen."""
        if actions[:-1] in self._starts and self._targets:
            worst, d = np.max(self._targets, axis=0), self._losses.shape[1]
            sizes = [name in SIZES for name in self.study.search.objectives]
            worst[:d] = np.where(sizes, self._starts[actions[:-1]].losses, worst[:d])
            self._learn(actions, worst)

    def learn_from(self, earlier: "Forks") -> int:
        """All rounds that an earlier search of the same model saw; how many."""
        self._steps, self._targets = earlier._steps + self._steps, earlier._targets + self._targets
        return len(earlier._steps)

    def ended(self, number: int) -> None:
        self._expected.pop(number, None)

    def ask(self, number: int, known: Container[tuple[Action, ...]]) -> Fork | None:
        """A round for trial `number` whose chain is not known; None where the pool has none. No chain trains longer than the
        longest of the space's trials and one round: a control is as long, and what is lost takes as long."""
        able = [parent for parent in self.frontier if parent.num_tokens < self.reach.num_tokens]
        able = able or [min(self.frontier, key=lambda parent: parent.num_tokens)]
        asked = optuna.create_study(sampler=self._sampler)
        pool = [self._drawn(asked.ask(), able[self._chance.integers(len(able))], number) for _ in range(POOL)]
        if all(fork.error is not None for fork in pool):
            return pool[0]
        pool = [fork for fork in pool if fork.action is not None and (*fork.parent.actions, fork.action) not in known]
        if not pool or len(self._steps) < MIN_ROUNDS:
            return pool[0] if pool else None
        steps = [(self._starts[fork.parent.actions], fork.action) for fork in pool if fork.action is not None]
        self._model.fit(self._steps, np.array(self._targets))
        means, deviations = self._model(steps)
        promised = self.promise(means, deviations)
        best = int(promised.argmax())
        self._expected[number] = means[best, :self._losses.shape[1]]
        return pool[best]._replace(gain_per_gpu_hour=self._per_gpu_hour(float(promised[best])))

    def _per_gpu_hour(self, gain: float) -> float | None:
        """Over the frontier's hypervolume and the mean round's GPU-hours; None where there are none, and where what is promised
        is to come nearer to constraints."""
        volume, gpu_s = hypervolume(self._losses, [False] * self._losses.shape[1], self._reference), np.mean(self._gpu_s)
        return gain / volume / float(gpu_s) * 3600 if gain >= 0 and volume and gpu_s else None

    @property
    def _reference(self) -> list[float]:
        """The dense model's sizes, and twice its qualities' losses."""
        dense = self._starts[()].losses if () in self._starts else np.ones(self._losses.shape[1])
        return [loss + (name not in SIZES) for name, loss in zip(self.study.search.objectives, dense)]

    def promise(self, means: Floats, deviations: Floats) -> Floats:
        """Expected gain of hypervolume of each proposal, beside what is running: (m, t), (m, t) -> (m,). Where none gains
        anything, minus what each is expected to miss of its constraints."""
        d = self._losses.shape[1]
        front = np.vstack([self._losses, *self._expected.values()])
        deviates = self._chance.standard_normal((NUM_SAMPLES, means.shape[1]))
        samples = means[:, None] + deviations[:, None] * deviates  # (m, samples, t)
        gains = hypervolume_gains(front, samples[:, :, :d].reshape(-1, d), self._reference).reshape(-1, NUM_SAMPLES)
        gains = np.where((samples[:, :, d:] <= 0).all(axis=2), gains, 0.0).mean(axis=1)
        return gains if gains.any() else -means[:, d:].clip(min=0).sum(axis=1)

    def _drawn(self, trial: optuna.Trial, parent: Parent, number: int) -> Fork:
        try:
            return Fork(trial, parent, self.action(Numbered(trial, number), parent))
        except ValueError as refused:
            return Fork(trial, parent, None, refused)

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


def sparsity_before(parent: Parent, pattern: str) -> float:
    """Of the weights of this pattern: what the last action that names it left, or what the model has."""
    named = [action.sparsity for action in parent.actions if action.pattern == pattern and action.sparsity is not None]
    if pattern != "unstructured":
        return named[-1] if named else 0.0
    sparsity = parent.record.sparsity
    return named[-1] if named and abs(named[-1] - sparsity) < ROUNDING else sparsity


def check_rule(study: Study, space: Space, num_train_tokens: int) -> tuple[Action, ...]:
    """What the `round` of the space's module, where it counts, makes of a dense parent, whose qualities are taken as 1;
    ValueError where it makes no action. One that asks such a parent for something else is believed."""
    forks = Forks(study, space, num_train_tokens, seed=0)
    if study.search.sampler != "ours" or forks.rule is None:
        return ()
    ones = {name: Metric(value=1.0, stderr=None, num_items=1) for name in study.search.objectives if name not in SIZES}
    nowhere = Provenance(created_at="", git_commit=None, versions={}, device="", hostname="")
    dense = RoundRecord(key="", parent=None, action=None, depth=0, num_parameters=1, num_prunable=1, num_nonzero=1,
                        sparsity=0.0, model_sparsity=0.0, layer_sparsity={}, stored_bytes=1, resident_bytes=1, metrics=ones,
                        prune_s=0.0, finetune_s=0.0, evaluate_s=0.0, train_loss=None, weights_sha256=None, provenance=nowhere)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    try:
        return (forks.action(Numbered(trial, 0), Parent(dense, (), 0)),)
    except ValueError as error:
        if not isinstance(error.__cause__, KeyError):
            raise
    return ()


class Numbered:
    """A trial of a sampler's own study, under the number that it is going to have in the journal."""

    def __init__(self, trial: optuna.Trial, number: int) -> None:
        self._trial, self.number = trial, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)
