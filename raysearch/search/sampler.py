"""The search's brain: which trial next, from what was observed. No Ray, no files: a simulator can drive it.

Optuna's own study does the sampling. Ray's OptunaSearch cannot do this job (it drops intermediate results of several
objectives and tells a stopped trial as complete: docs/log.md), so this is a small one on `study.ask` and `study.tell`.
"""

from collections.abc import Sequence

import optuna
from optuna.trial import TrialState

from raysearch.config import Study, TrialConfig
from raysearch.search.space import Space, draw
from raysearch.study.records import RoundRecord, TrialRecord, objective_values


class Sampler:
    """Asks for trials and observes rounds. `optuna_study` holds what was told before; `given` configurations are proposed in
    their order instead of what Optuna samples from `space`."""

    def __init__(self, optuna_study: optuna.Study, study: Study, space: Space, given: Sequence[TrialConfig] | None = None,
                 num_asked: int = 0) -> None:
        self.optuna_study, self.study, self.space, self.given = optuna_study, study, space, given
        self.num_asked = num_asked
        """Trials that count: those that began, in this sweep and before it."""
        self._last: dict[int | None, RoundRecord] = {}

    def ask(self) -> tuple[int, TrialConfig]:
        """Number and configuration of the next trial; ValueError where the space contradicts itself."""
        trial = self.optuna_study.ask()
        config = draw(self.space, trial) if self.given is None else self.given[self.num_asked]
        self.num_asked += 1
        return trial.number, config

    def observe(self, number: int | None, candidate: RoundRecord) -> None:
        """A finished round of trial `number`; None is the dense baseline, the round 0 of all."""
        self._last[number] = candidate

    def end(self, trial: TrialRecord, crashed: bool) -> None:
        """The trial will not go on. Optuna hears its last candidate: samplers on parameters know nothing of rounds.

        A diverged trial is complete but infeasible, so that the sampler learns from it; a crashed one fails, which says
        nothing about its configuration.
        """
        handle = optuna.Trial(self.optuna_study, self.optuna_study.get_trials(deepcopy=False)[trial.number]._trial_id)
        handle.set_user_attr("keys", list(trial.keys))
        if trial.reason:
            handle.set_user_attr("reason", trial.reason)
        if trial.status == "failed" and (crashed or trial.traceback):
            self.optuna_study.tell(trial.number, state=TrialState.FAIL)
            return
        last = self._last.get(trial.number, self._last.get(None))
        assert last is not None, "the dense baseline is observed before any trial ends"
        handle.set_constraint("diverged", 1.0 if trial.status == "failed" else -1.0)
        self.optuna_study.tell(trial.number, objective_values(last, self.study.search.objectives))
