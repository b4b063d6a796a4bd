"""What is asked of Optuna and what it hears, on a real study in memory."""

import json
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from synthetic_study import PROVENANCE, ROOT, metrics

from raysearch.config import Action, TrialConfig, study_of
from raysearch.search.sampler import Sampler
from raysearch.search.space import Space
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
    drawn = [one.config.target_sparsity for one in asked]
    assert [one.parameters for one in asked] == [{"target_sparsity": sparsity} for sparsity in drawn]
    assert all(json.loads(one.distributions["target_sparsity"])["name"] == "FloatDistribution" for one in asked)
    assert drawn == [trial.params["target_sparsity"] for trial in sampler.journal.trials]
    assert len(set(drawn)) == 5
    assert all(0.1 <= sparsity <= 0.9 for sparsity in drawn)


def test_given_trials_that_did_not_begin_come_in_their_order() -> None:
    given = [TrialConfig(target_sparsity=sparsity) for sparsity in (0.1, 0.2, 0.3)]
    sampler = Sampler(optuna.create_study(), STUDY, space, given, num_asked=1)
    sampler.recall(ended(0, "done").model_copy(update={"config": given[1]}), lambda key: None)
    assert [sampler.ask().config for _ in range(2)] == [given[0], given[2]]


def test_a_given_trial_waits_for_a_running_one_that_makes_its_rounds() -> None:
    """Chains of one rate, shortest first, and two workers: none begins with a round that is being made."""
    chains = [[TrialConfig(schedule="constant", rate=rate, num_rounds=length) for length in (1, 2, 3)] for rate in (0.1, 0.3)]
    sampler = Sampler(optuna.create_study(directions=["minimize", "minimize"]), STUDY, space, [*chains[0], *chains[1]])
    assert [sampler.ask().config for _ in range(2)] == [chains[0][0], chains[1][0]]
    assert sampler.ask().config == chains[0][1]  # all that are left collide, so the first one begins
    sampler.observe(0, candidate("a", 0.1, 1))
    sampler.end(ended(0, "done", ("a",)))
    sampler.observe(1, candidate("b", 0.3, 1))
    assert sampler.ask().config == chains[1][1]  # its first round is there, though trial 1 has not ended


def test_a_space_that_fails_late_costs_that_trial_alone(sampler: Sampler) -> None:
    sampler.space = lambda trial: {"rate": 2.0} if trial.number == 1 else space(trial)
    asked = [sampler.ask() for _ in range(3)]
    assert [one.error is not None for one in asked] == [False, True, False]
    sampler.observations.clear()  # also before the dense baseline is scored
    sampler.end(ended(1, "failed", reason=str(asked[1].error), crashed=True))
    assert sampler.journal.trials[1].state == TrialState.FAIL
    assert sampler.journal.trials[1].user_attrs["reason"].startswith("space(trial): rate: Input should be less than 1")


def test_optuna_hears_the_last_round_of_a_trial(sampler: Sampler) -> None:
    number = sampler.ask().number
    for depth, (key, sparsity) in enumerate((("a", 0.25), ("b", 0.5)), start=1):
        sampler.observe(number, candidate(key, sparsity, depth))
    sampler.end(ended(number, "done", ("a", "b")))
    assert [(depth, values[0]) for depth, values in sampler.observations[number].items()] == [(1, 80.0), (2, 60.0)]
    (trial,) = sampler.journal.trials
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [60.0, metrics(0.5, 0.0)["text/bits_per_byte"].value])
    assert trial.user_attrs["keys"] == ["a", "b"]
    assert sampler.journal.best_trials == [trial]


def test_a_diverged_trial_is_complete_and_never_among_the_best(sampler: Sampler) -> None:
    for status in ("failed", "done"):
        number = sampler.ask().number
        sampler.end(ended(number, status, reason="round 1: the training loss became nan"))
    diverged, done = sampler.journal.trials
    assert diverged.state == done.state == TrialState.COMPLETE
    assert diverged.values == done.values == [100.0, metrics(0.0, 0.0)["text/bits_per_byte"].value]  # round 0 of all
    assert diverged.user_attrs["reason"] == "round 1: the training loss became nan"
    assert sampler.journal.best_trials == [done]


def test_a_crash_says_nothing_about_its_configuration(sampler: Sampler) -> None:
    sampler.end(ended(sampler.ask().number, "failed", reason="its process died", crashed=True))
    (trial,) = sampler.journal.trials
    assert (trial.state, trial.values) == (TrialState.FAIL, None)


# ---- harvest: what the sampler hears beside the last rounds ----


def prunes(schedule: str, name: str, most: float) -> Space:
    """1 to 4 rounds to what `name` says."""
    def space(trial: optuna.Trial) -> dict[str, Any]:
        return {"schedule": schedule, "num_rounds": trial.suggest_int("num_rounds", 1, 4),
                name.rpartition("/")[2]: trial.suggest_float(name, 0.01, most)}
    return space


def heard(sampler: Sampler) -> list[tuple[int, list[float], bool]]:
    """(rounds, values, whether feasible) of the finished trials that the sampler hears, those of the search last."""
    return sorted((trial.params["num_rounds"], trial.values, trial.constraints["diverged"] < 0)
                  for trial in sampler.heard.get_trials(states=[TrialState.COMPLETE]))


def searched(space: Space, finished: int, status: str = "done") -> tuple[Sampler, TrialRecord, list[RoundRecord]]:
    """A trial of four rounds, of which so many were finished."""
    made = Sampler(optuna.create_study(directions=["minimize"] * 2), STUDY, space,
                   sampler=optuna.samplers.PartialFixedSampler({"num_rounds": 4}, optuna.samplers.RandomSampler(seed=0)))
    made.observe(None, candidate(ROOT, 0.0, 0))
    asked = made.ask()
    rounds = [candidate(f"round {depth}", 0.1 * depth, depth) for depth in range(1, finished + 1)]
    for record in rounds:
        made.observe(asked.number, record)
        made.observe(asked.number, record)  # found in the store by the next sweep
    trial = TrialRecord(number=0, config=asked.config, actions=asked.actions, parameters=asked.parameters,
                        distributions=asked.distributions, keys=tuple(record.key for record in rounds), status=status,
                        started_at="now")
    if status != "running":
        made.end(trial)
    return made, trial, rounds


@pytest.mark.parametrize(("schedule", "name", "num_heard"), [
    ("constant", "rate", 4), ("linear", "target_sparsity", 4), ("exponential", "target_sparsity", 4),
    ("linear", "threshold", 4), ("linear", "way/target_sparsity", 4), ("cubic", "target_sparsity", 2),
    ("cosine", "target_sparsity", 2)])
def test_a_prefix_that_is_a_configuration_of_the_space_is_heard_as_one(schedule: str, name: str, num_heard: int) -> None:
    """Any path of one round is; the first ones of a cubic path of four lie on no cubic path."""
    made, _, rounds = searched(prunes(schedule, name, 0.9), 4)
    told = heard(made)
    assert len(told) == num_heard
    for num_rounds, values, feasible in told:
        assert (values[0], feasible) == (rounds[num_rounds - 1].num_nonzero, True)
    assert len(made.journal.trials) == 1  # people read one entry a trial


def test_what_the_space_cannot_say_is_not_heard() -> None:
    def other_name(trial: optuna.Trial) -> dict[str, Any]:
        return {"schedule": "constant", "rate": 0.2, "num_rounds": 5 - trial.suggest_int("num_rounds", 1, 4)}

    def fewer(trial: optuna.Trial) -> dict[str, Any]:
        return {"schedule": "constant", "rate": 0.2, "num_rounds": trial.suggest_int("num_rounds", 3, 4)}

    made, _, _ = searched(fewer, 4)
    assert [told[0] for told in heard(made)] == [3, 4]
    made, _, _ = searched(other_name, 1)
    assert [told[0] for told in heard(made)] == [4]


def test_of_a_diverged_trial_the_finished_rounds_are_feasible_and_the_next_is_not() -> None:
    made, trial, rounds = searched(prunes("constant", "rate", 0.3), 2, "failed")
    assert [(told[0], told[2]) for told in heard(made)] == [(1, True), (2, True), (3, False), (4, False)]
    crashed, _, _ = searched(prunes("constant", "rate", 0.3), 2, "running")
    crashed.end(trial.model_copy(update={"crashed": True}))
    assert [(told[0], told[2]) for told in heard(crashed)] == [(1, True), (2, True)]


@pytest.mark.parametrize(("finished", "status"), [(4, "done"), (2, "failed"), (3, "running"), (0, "running")])
def test_the_next_sweep_hears_all_again(finished: int, status: str) -> None:
    made, trial, rounds = searched(prunes("linear", "threshold", 2.0), finished, status)
    again = Sampler(made.journal, STUDY, made.space)
    again.observe(None, candidate(ROOT, 0.0, 0))
    again.recall(trial, {record.key: record for record in rounds}.get)
    assert heard(again) == heard(made)
    assert ([trial.params for trial in again.heard.get_trials(states=[TrialState.RUNNING])]
            == [trial.params for trial in made.heard.get_trials(states=[TrialState.RUNNING])])


def test_equal_lists_of_actions_are_proposed_once_and_a_space_may_be_used_up() -> None:
    def grid(trial: optuna.Trial) -> dict[str, Any]:
        trial.suggest_float("unused", 0, 1)
        return {"schedule": "constant", "rate": trial.suggest_categorical("rate", [0.1, 0.2, 0.3]),
                "num_rounds": trial.suggest_int("num_rounds", 1, 3)}

    made = Sampler(optuna.create_study(directions=["minimize"] * 2), STUDY, grid)
    asked = [made.ask() for _ in range(10)]
    proposed = [one.actions for one in asked if one is not None]
    assert 3 <= len(proposed) < 9
    assert asked[-1] is None
    assert made.num_asked == len(proposed) == len(made.journal.trials)
    for number, actions in enumerate(proposed):  # none is another, nor the beginning of one before it
        assert not any(before[:len(actions)] == actions for before in proposed[:number])
    again = Sampler(made.journal, STUDY, grid)
    for one in asked[:len(proposed)]:
        again.recall(ended(one.number, "done", parameters=one.parameters).model_copy(update={"actions": one.actions}), {}.get)
    assert again.ask() is None


def test_running_trials_are_pending_and_numbers_are_the_journals() -> None:
    seen = []

    def numbered(trial: optuna.Trial) -> dict[str, Any]:
        seen.append(trial.number)
        return prunes("constant", "rate", 0.5)(trial)

    made = Sampler(optuna.create_study(directions=["minimize"] * 2), STUDY, numbered)
    for _ in range(3):
        asked = made.ask()
        made.observe(asked.number, candidate(f"{asked.number}", 0.3, 1))
    assert sorted(set(seen)) == [0, 1, 2]
    assert len(made.heard.get_trials(states=[TrialState.RUNNING])) == 3
    assert [trial.state for trial in made.journal.trials] == [TrialState.RUNNING] * 3


@pytest.mark.parametrize("name", ["tpe", "gp", "nsga2", "random"])
def test_every_sampler_hears_of_rounds_and_constraints_and_repeats_itself(name: str) -> None:
    def run() -> Sampler:
        study = STUDY.replaced(sampler=name, constraints={"num_nonzero": 70}, max_drop={"last_word/acc": 5.0})
        made = Sampler(optuna.create_study(directions=["minimize"] * 2), study, prunes("linear", "target_sparsity", 0.9))
        made.observe(None, candidate(ROOT, 0.0, 0))
        for number in range(14):
            asked = made.ask()
            assert asked.forked_at is None
            for depth, action in enumerate(asked.actions, start=1):
                made.observe(number, candidate(f"{number} {depth}", action.sparsity, depth))
            keys = ("k",) * len(asked.actions)
            made.end(ended(number, "done").model_copy(update={"actions": asked.actions, "keys": keys}))
        return made

    made = run()
    assert [trial.params for trial in made.heard.trials] == [trial.params for trial in run().heard.trials]
    assert len(made.heard.trials) > 14
    told = [trial for trial in made.heard.trials if trial.state == TrialState.COMPLETE]
    for trial in told:  # accuracy is 0.6 - 0.3 s^2, so that 5 points are lost at a sparsity of 0.41; 30 weights at 0.375
        sparsity = (100 - trial.values[0]) / 80
        assert (trial.constraints["num_nonzero"] <= 0) == (trial.values[0] <= 70)
        if abs(lost := 0.3 * sparsity**2 - 0.05) > 0.01:  # num_nonzero is rounded
            assert (trial.constraints["max_drop last_word/acc"] > 0) == (lost > 0)
    assert made.journal.best_trials == [trial for trial in made.journal.best_trials
                                        if all(value <= 0 for value in trial.constraints.values())]


def test_what_the_user_enqueues_comes_first_and_once() -> None:
    mine = [TrialConfig(target_sparsity=0.33), (Action(sparsity=0.44), Action(sparsity=0.55))]
    first = Sampler(optuna.create_study(directions=["minimize"] * 2), STUDY, space, enqueued=mine)
    asked = [first.ask() for _ in range(3)]
    assert [one.actions for one in asked[:2]] == [(Action(sparsity=0.33),), mine[1]]
    assert [one.config for one in asked[:2]] == [mine[0], None]
    assert set(asked[2].parameters) == {"target_sparsity"}
    again = Sampler(first.journal, STUDY, space, enqueued=[*mine, TrialConfig(target_sparsity=0.66)], num_asked=3)
    for one in asked[:2]:
        again.recall(ended(one.number, "done").model_copy(update={"actions": one.actions, "config": one.config}), {}.get)
    assert again.ask().actions == (Action(sparsity=0.66),)
    assert again.ask().parameters
