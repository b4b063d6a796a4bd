"""The search's brain: which trial next, from what was observed. No Ray, no files: a simulator can drive it.

Optuna's own study does the sampling. Ray's OptunaSearch cannot do this job (it drops intermediate results of several
objectives and tells a stopped trial as complete: docs/log.md), so this is a small one on `study.ask` and `study.tell`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from raysearch.config import Study
from raysearch.search.space import GivenTrial, Proposals, Space, draw
from raysearch.study.records import RoundRecord, TrialRecord, objective_values


class Asked(NamedTuple):
    number: int
    trial: GivenTrial | ValueError
    """The error where the space makes none."""
    parameters: dict[str, Any]
    """What was sampled; empty for a given trial."""
    distributions: dict[str, str]
    """Optuna's JSON of what each was drawn from."""


class Observation(NamedTuple):
    """A finished round of a trial."""

    depth: int
    """Actions so far."""
    values: tuple[float, ...] | None
    """Of the objectives; None where a metric is missing."""


class Sampler:
    """Asks for trials and observes rounds. `optuna_study` holds what was told before; `given` trials are proposed in their
    order instead of what Optuna samples from `space`; `proposals`, the fingerprint of the study's space, is what each trial is
    checked against."""

    def __init__(self, optuna_study: optuna.Study, study: Study, space: Space, given: Sequence[GivenTrial] | None = None,
                 num_asked: int = 0, proposals: Proposals | None = None) -> None:
        self.optuna_study, self.study, self.space, self.given = optuna_study, study, space, given
        self.num_asked, self.proposals = num_asked, proposals
        """Trials that count: those that began, in this sweep and before it."""
        self.observations: dict[int | None, list[Observation]] = {}
        """By trial, in order; None is the dense baseline, the round 0 of all."""

    def ask(self) -> Asked:
        """The next trial."""
        trial = self.optuna_study.ask()
        proposed: GivenTrial | ValueError
        distributions = {}
        try:
            proposed = draw(self.space, trial) if self.given is None else self.given[self.num_asked]
            distributions = {name: distribution_to_json(each) for name, each in trial.distributions.items()}
            if self.proposals is not None:
                self.proposals.check(distributions)
        except ValueError as error:
            proposed = error
        self.num_asked += 1
        return Asked(trial.number, proposed, dict(trial.params), distributions)

    def observe(self, number: int | None, candidate: RoundRecord) -> None:
        """A finished round of trial `number`; None is the dense baseline. One that was observed already is not again."""
        rounds = self.observations.setdefault(number, [])
        if all(known.depth != candidate.depth for known in rounds):
            rounds.append(Observation(candidate.depth, objective_values(candidate, self.study.search.objectives)))

    def end(self, trial: TrialRecord) -> None:
        """The trial will not go on. Optuna hears its last candidate: samplers on parameters know nothing of rounds."""
        rounds = [*self.observations.get(None, []), *self.observations.get(trial.number, [])]
        state, values, constraints = outcome(trial, rounds[-1].values if rounds else None)
        handle = optuna.Trial(self.optuna_study, self.optuna_study.get_trials(deepcopy=False)[trial.number]._trial_id)
        for name, value in user_attributes(trial).items():
            handle.set_user_attr(name, value)
        for name, value in constraints.items():
            handle.set_constraint(name, value)
        self.optuna_study.tell(trial.number, values, state=state)


def outcome(trial: TrialRecord, values: Sequence[float] | None
            ) -> tuple[TrialState, Sequence[float] | None, dict[str, float]]:
    """(state, values, constraints) by which Optuna knows a trial that ended.

    A diverged trial is complete but infeasible, so that the sampler learns from it; a crashed one fails, which says nothing
    about its configuration, and so does one whose last candidate lacks an objective.
    """
    if trial.crashed or values is None:
        return TrialState.FAIL, None, {}
    return TrialState.COMPLETE, values, {"diverged": 1.0 if trial.status == "failed" else -1.0}


def user_attributes(trial: TrialRecord) -> dict[str, Any]:
    """What optuna-dashboard shows beside the parameters."""
    return {"keys": list(trial.keys)} | ({"reason": trial.reason} if trial.reason else {})


def told_again(trial: TrialRecord, values: Sequence[float] | None) -> FrozenTrial:
    """The trial as Optuna knew it, from its record and the objectives of its last candidate (the dense baseline's where it
    has none)."""
    known = {"params": trial.parameters,
             "distributions": {name: json_to_distribution(each) for name, each in trial.distributions.items()}}
    if trial.status == "running":
        return optuna.trial.create_trial(state=TrialState.RUNNING, **known)
    state, values, constraints = outcome(trial, values)
    return optuna.trial.create_trial(state=state, values=values, constraints=constraints, user_attrs=user_attributes(trial),
                                     **known)
