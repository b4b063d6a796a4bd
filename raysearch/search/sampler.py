"""The search's brain: which trial next, from every round that was observed. No Ray, no files: a simulator drives it too.

Optuna's own study does the sampling. Ray's OptunaSearch cannot do this job (it drops intermediate results of several
objectives and tells a stopped trial as complete: docs/log.md), so this is a small one on `study.ask` and `study.tell`.
"""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from raysearch.config import Action, Study, TrialConfig
from raysearch.search.forks import Forks, Numbered
from raysearch.search.space import GivenTrial, Proposals, Space, draw, given_as
from raysearch.search.violations import violations
from raysearch.study.records import RoundRecord, TrialRecord, objective_values
from raysearch.trial.actions import resolve_actions

NUM_DRAWS, NUM_RANDOM_DRAWS = 20, 1000
"""How often the sampler, and after it chance, may propose what was proposed before, until the space counts as used up. Of one
that has a single new configuration among 100, chance misses it once in 20,000 times."""
NUM_WHOLE = 4
"""Trials that begin with the dense model before the first fork: enough for parents of several sizes."""
FORK = "fork/"
"""Before the names of a fork's parameters, which mean another thing than those of a whole trial."""


class Asked(NamedTuple):
    number: int
    config: TrialConfig | None
    """None where the trial was given as actions, and where the space makes none."""
    actions: tuple[Action, ...]
    parameters: dict[str, Any]
    """What was sampled; empty for a given trial."""
    distributions: dict[str, str]
    """Optuna's JSON of what each was drawn from."""
    error: ValueError | None = None
    """Why the space makes none."""
    forked_at: int | None = None
    """As in TrialRecord, and so is the next."""
    gain_per_gpu_hour: float | None = None


class Sampler:
    """Asks for trials and observes rounds. `journal` holds what was told before and hears one entry a trial, for people and
    the next sweep; `given` trials are proposed instead of what `sampler` (the study's) makes of `space`, in their order but for
    those that wait for rounds of a running one, and those of `enqueued` before it, each once; `proposals`, the fingerprint of
    the study's space, is what each trial is checked against."""

    def __init__(self, journal: optuna.Study, study: Study, space: Space, given: Sequence[GivenTrial] | None = None,
                 num_asked: int = 0, proposals: Proposals | None = None, num_train_tokens: int = 0,
                 sampler: optuna.samplers.BaseSampler | None = None, enqueued: Sequence[GivenTrial] = ()) -> None:
        self.journal, self.study, self.space = journal, study, space
        self._left = None if given is None else list(given)
        """The given trials that did not begin."""
        self._enqueued = list(enqueued)
        self.num_asked, self.proposals, self.num_train_tokens = num_asked, proposals, num_train_tokens
        """Trials that count: those that began, in this sweep and before it."""
        self._dense: RoundRecord | None = None
        self._missed: dict[tuple[int | None, int], dict[str, float]] = {}
        """By trial and depth, how far the constraints are missed."""
        self.observations: dict[int | None, dict[int, tuple[float, ...] | None]] = {}
        """By trial and depth (actions so far), the objectives' values; None is the dense baseline, the round 0 of all, and
        for values that a metric is missing."""
        seed = study.search.sampler_seed + len(journal.get_trials(deepcopy=False))
        told = [trial for trial in journal.get_trials(deepcopy=False) if "forked_at" not in trial.user_attrs]
        self.heard = optuna.create_study(directions=journal.directions,
                                         sampler=sampler or optuna_sampler(study.search.sampler, seed))
        """What the sampler hears: each trial, and each of its prefixes that the space has a configuration for."""
        self.heard.add_trials(told)
        self._chance = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        self._asked: dict[int, Asked] = {}
        self._number_heard = {trial.number: number for number, trial in enumerate(told)}
        self.forks = Forks(study, space, num_train_tokens, seed) if study.search.sampler == "ours" and given is None else None
        self.gains: list[float | None] = []
        """By trial, its gain_per_gpu_hour."""
        self._num_whole = 0
        self._proposed: set[tuple[Action, ...]] = set()
        """With the prefixes of each: whose rounds all are known, or will be."""

    def recall(self, trial: TrialRecord, candidate: Callable[[str], RoundRecord | None]) -> None:
        """A trial of an earlier sweep, which the journal knows, and its rounds."""
        asked = Asked(trial.number, trial.config, trial.actions, trial.parameters, trial.distributions,
                      forked_at=trial.forked_at)
        self._asked[trial.number] = asked
        if self._left is not None and not trial.is_finish:
            self._left.remove(given_as(trial))
        self._proposed.update(prefixes(trial.actions))
        self._num_whole += trial.forked_at is None
        self.gains += [] if trial.is_finish else [trial.gain_per_gpu_hour]
        for depth, key in enumerate(trial.keys, start=1):
            is_heard = depth < len(trial.actions) and (trial.status == "failed" or self._prefix(asked, depth))
            is_own = self.forks is not None and depth > (trial.forked_at or 0)
            if (is_heard or is_own) and (record := candidate(key)) is not None:
                self.observe(trial.number, record)
        self._hear_divergence(trial)

    def ask(self) -> Asked | None:
        """The next trial; None where the space has none that was not proposed."""
        number = len(self.journal.get_trials(deepcopy=False))
        if self._left is not None:
            asked: Asked | None = self._given(number, self._left.pop(self._apart()))
        else:
            asked = self._first(number) or self._fork(number) or self._new(number)
        if asked is not None:
            self._asked[number] = asked
            self._proposed.update(prefixes(asked.actions))
            self._num_whole += asked.forked_at is None
            self.gains.append(asked.gain_per_gpu_hour)
            params, distributions = known(asked)
            self.journal.add_trial(optuna.trial.create_trial(
                state=TrialState.RUNNING, params=params, distributions=distributions, user_attrs=forked(asked)))
            self.num_asked += 1
        return asked

    def _fork(self, number: int) -> Asked | None:
        """A round on a candidate of before; None where it is too early for one, and where none is new."""
        if self.forks is None or self._num_whole < NUM_WHOLE or len(self.forks.frontier) < 2:
            return None
        if (fork := self.forks.ask(number, self._proposed)) is None:
            return None
        parent = fork.parent.actions
        actions = parent if fork.action is None else (*parent, fork.action)
        return self._checked(fork.trial, Asked(number, None, actions, {}, {}, fork.error, len(parent), fork.gain_per_gpu_hour),
                             FORK)

    def _first(self, number: int) -> Asked | None:
        """The next trial of the user's that was not proposed, in this sweep or before it."""
        while self._enqueued:
            asked = self._given(number, self._enqueued.pop(0))
            if asked.actions not in self._proposed:
                return asked
            self.heard.tell(self._number_heard.pop(number), state=TrialState.FAIL)
        return None

    def _apart(self) -> int:
        """Position of the first given trial that has no round in common with those that running trials have still to do, which
        would be computed twice; 0 where there is none."""
        assert self._left is not None
        due = {chain for trial in self.journal.get_trials(deepcopy=False, states=[TrialState.RUNNING])
               if trial.number in self._asked
               for chain in prefixes(self._asked[trial.number].actions)[len(self.observations.get(trial.number, ())):]}
        return next((position for position, trial in enumerate(self._left)
                     if due.isdisjoint(prefixes(self._resolved(trial)))), 0)

    def _given(self, number: int, trial: GivenTrial) -> Asked:
        self._number_heard[number] = self.heard.ask().number
        return Asked(number, trial if isinstance(trial, TrialConfig) else None, self._resolved(trial), {}, {})

    def _resolved(self, trial: GivenTrial) -> tuple[Action, ...]:
        return resolve_actions(trial, self.study, self.num_train_tokens) if isinstance(trial, TrialConfig) else trial

    def _new(self, number: int) -> Asked | None:
        for study in [self.heard] * NUM_DRAWS + [self._chance] * NUM_RANDOM_DRAWS:
            trial = study.ask()
            asked = self._draw(Numbered(trial, number))
            if asked.error is not None or asked.actions not in self._proposed:
                self._number_heard[number] = trial.number if study is self.heard else self._pending(
                    optuna.trial.create_trial(state=TrialState.RUNNING, params=trial.params,
                                              distributions=trial.distributions))
                return asked
            study.tell(trial, state=TrialState.FAIL)
        return None

    def _pending(self, trial: FrozenTrial) -> int:
        """Its number in the sampler's study, which hears of it."""
        self.heard.add_trial(trial)
        return len(self.heard.get_trials(deepcopy=False)) - 1

    def _draw(self, trial: Any) -> Asked:
        """What the space makes of the trial."""
        config, actions, error = None, (), None
        try:
            config = draw(self.space, trial)
            actions = resolve_actions(config, self.study, self.num_train_tokens)
        except ValueError as refused:
            error = refused
        return self._checked(trial, Asked(trial.number, config, actions, {}, {}, error))

    def _checked(self, trial: Any, asked: Asked, prefix: str = "") -> Asked:
        """With the trial's parameters, and without actions where they, or what was made of them, are not as they should be."""
        distributions, error = {name: distribution_to_json(each) for name, each in trial.distributions.items()}, asked.error
        has_rule = prefix and self.forks is not None and self.forks.rule  # whose parameters are its own
        try:
            if self.proposals is not None and not has_rule:
                self.proposals.check(distributions)
        except ValueError as refused:
            error = error or refused
        return asked._replace(actions=() if error else asked.actions, error=error,
                              parameters={prefix + name: value for name, value in trial.params.items()},
                              distributions={prefix + name: each for name, each in distributions.items()})

    def _prefix(self, asked: Asked, depth: int) -> FrozenTrial | None:
        """The configuration of the space whose rounds are the trial's first ones, as a running trial; None where there is none.

        It is the trial's own with the number of rounds, and where that is not enough the target, of the prefix: what comes out
        is compared, so it may only be missed, as where a parameter is not named like its setting.
        """
        if asked.config is None or not asked.parameters:
            return None
        last = asked.actions[depth - 1]
        own = {name: name.rpartition("/")[2] for name, value in asked.parameters.items()
               if value == getattr(asked.config, name.rpartition("/")[2], None)}
        if asked.config.num_rounds is not None and "num_rounds" not in own.values():
            return None  # what says the number of rounds has another name
        of_prefix = {"num_rounds": depth, "target_sparsity": last.sparsity, "threshold": last.threshold}
        for fields in (("num_rounds",), ("num_rounds", "target_sparsity", "threshold")):
            changes = {name: of_prefix[field] for name, field in own.items() if field in fields}
            if not changes:
                continue
            # FixedTrial warns of what lies outside a parameter's range, and create_trial refuses it
            with warnings.catch_warnings(action="ignore", category=UserWarning), contextlib.suppress(ValueError):
                fixed = optuna.trial.FixedTrial(asked.parameters | changes, asked.number)
                if to_9_decimals(self._draw(fixed).actions) == to_9_decimals(asked.actions[:depth]):
                    return optuna.trial.create_trial(state=TrialState.RUNNING, params=dict(fixed.params),
                                                     distributions=dict(fixed.distributions))
        return None

    def observe(self, number: int | None, candidate: RoundRecord) -> None:
        """A finished round of trial `number`; None is the dense baseline. One that was observed already is not again."""
        rounds = self.observations.setdefault(number, {})
        if candidate.depth in rounds:
            return
        rounds[candidate.depth] = values = objective_values(candidate, self.study.search.objectives)
        actions = () if number is None else self._asked[number].actions
        if number is None:
            self._dense = candidate
        self._missed[number, candidate.depth] = missed = violations(candidate, self._dense, self.study.search)
        if number is not None and candidate.depth < len(actions):
            self._hear(number, candidate.depth, values, missed, diverged=False)
        if self.forks is not None:
            self.forks.observe(candidate, actions[:candidate.depth], missed)

    def _hear(self, number: int, depth: int, values: Sequence[float] | None, missed: Mapping[str, float], diverged: bool
              ) -> None:
        prefix = self._prefix(self._asked[number], depth)
        if prefix is not None and values is not None:
            tell(self.heard, self._pending(prefix), *complete(values, missed, diverged))

    def end(self, trial: TrialRecord) -> None:
        """The trial will not go on: the journal and the sampler hear its last candidate, and of a diverged round also the
        configuration that ends with it."""
        values, missed = self._last(trial)
        handle = optuna.Trial(self.journal, self.journal.get_trials(deepcopy=False)[trial.number]._trial_id)
        for name, value in user_attributes(trial).items():
            handle.set_user_attr(name, value)
        tell(self.journal, trial.number, *outcome(trial, values, missed))
        if trial.forked_at is None:
            tell(self.heard, self._number_heard[trial.number], *outcome(trial, values, missed))
        self._hear_divergence(trial)
        if self.forks is not None:
            self.forks.ended(trial.number)

    def _hear_divergence(self, trial: TrialRecord) -> None:
        if trial.status != "failed" or trial.crashed:
            return
        if self.forks is not None:
            self.forks.diverged(trial.actions[:len(trial.keys) + 1])
        if len(trial.keys) + 1 < len(trial.actions):
            self._hear(trial.number, len(trial.keys) + 1, *self._last(trial), diverged=True)

    def _last(self, trial: TrialRecord) -> tuple[tuple[float, ...] | None, dict[str, float]]:
        """(values, what they miss) of its last candidate, the dense baseline's where it has none."""
        for number in (trial.number, None):
            if rounds := self.observations.get(number):
                return rounds[max(rounds)], self._missed[number, max(rounds)]
        return None, {}


Outcome = tuple[TrialState, Sequence[float] | None, dict[str, float]]
"""(state, values, constraints) by which Optuna knows a trial that ended."""


def tell(study: optuna.Study, number: int, state: TrialState, values: Sequence[float] | None,
         constraints: dict[str, float]) -> None:
    handle = optuna.Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)
    for name, value in constraints.items():
        handle.set_constraint(name, value)
    study.tell(number, values, state=state)


def prefixes(actions: tuple[Action, ...]) -> list[tuple[Action, ...]]:
    return [actions[:depth] for depth in range(1, len(actions) + 1)]


def to_9_decimals(actions: Sequence[Action]) -> list[Action]:
    """Of the 12 to which cuts are rounded, the last may differ where two configurations say the same path."""
    return [action.model_copy(update={name: round(cut, 9) for name in ("sparsity", "threshold")
                                      if (cut := getattr(action, name)) is not None}) for action in actions]


def outcome(trial: TrialRecord, values: Sequence[float] | None, missed: Mapping[str, float]) -> Outcome:
    """How a trial ended. A diverged one is complete but infeasible, so that the sampler learns from it; a crashed one fails,
    which says nothing about its configuration, and so does one whose last candidate lacks an objective."""
    if trial.crashed or values is None:
        return TrialState.FAIL, None, {}
    return complete(values, missed, trial.status == "failed")


def complete(values: Sequence[float], missed: Mapping[str, float], diverged: bool) -> Outcome:
    return TrialState.COMPLETE, values, {"diverged": 1.0 if diverged else -1.0, **missed}


def optuna_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Of this setting, for whole configurations. A population of NSGA-II's is small, as studies are."""
    samplers = optuna.samplers
    if name == "gp":
        return samplers.GPSampler(seed=seed)
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=16)
    return samplers.RandomSampler(seed=seed) if name == "random" else samplers.TPESampler(seed=seed)


def forked(trial: TrialRecord | Asked) -> dict[str, Any]:
    """Of Optuna's user attributes, by which a fork is known in the journal."""
    return {} if trial.forked_at is None else {"forked_at": trial.forked_at}


def user_attributes(trial: TrialRecord) -> dict[str, Any]:
    """What optuna-dashboard shows beside the parameters."""
    return {"keys": list(trial.keys)} | ({"reason": trial.reason} if trial.reason else {}) | forked(trial)


def known(trial: TrialRecord | Asked, prefix: str = "") -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """(parameters, distributions) of a trial, their names without the prefix."""
    return ({name.removeprefix(prefix): value for name, value in trial.parameters.items()},
            {name.removeprefix(prefix): json_to_distribution(each) for name, each in trial.distributions.items()})


def told_again(trial: TrialRecord, values: Sequence[float] | None, missed: Mapping[str, float]) -> FrozenTrial:
    """The trial as Optuna knew it, from its record and the objectives of its last candidate (the dense baseline's where it
    has none), and what that misses of the constraints."""
    params, distributions = known(trial)
    if trial.status == "running":
        return optuna.trial.create_trial(state=TrialState.RUNNING, params=params, distributions=distributions,
                                         user_attrs=forked(trial))
    state, values, constraints = outcome(trial, values, missed)
    return optuna.trial.create_trial(state=state, values=values, constraints=constraints, user_attrs=user_attributes(trial),
                                     params=params, distributions=distributions)
