"""Forks: where they start, what round they take, what is learned from them, and that nothing of it is lost."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from small_study import sweep
from synthetic_study import PROVENANCE, ROOT, metrics

from raysearch.config import Action, Study, study_of
from raysearch.pruning.pareto import hypervolume
from raysearch.search.forks import MIN_ROUNDS, Forks, check_rule
from raysearch.search.journal import open_journal
from raysearch.search.sampler import NUM_WHOLE, Sampler
from raysearch.search.violations import violations
from raysearch.study.ledger import Ledger
from raysearch.study.records import RoundRecord, TrialRecord, round_key
from raysearch.trial.worker import Worker

STUDY = study_of(path="m", epoch_tokens=1024, batch_tokens=256, context_tokens=64)
TOKENS = 10**6


def candidate(key: str, sparsity: float, depth: int, shift: float = 0.0, **changes: Any) -> RoundRecord:
    return RoundRecord(
        key=key, parent=None, action=None, depth=depth, num_parameters=1000, num_prunable=800,
        num_nonzero=1000 - round(800 * sparsity), sparsity=sparsity, model_sparsity=0.8 * sparsity, layer_sparsity={},
        stored_bytes=400, resident_bytes=400, metrics=metrics(sparsity, 0.0, shift), train_loss=None, prune_s=0.0,
        finetune_s=0.0, evaluate_s=0.0, weights_sha256=None, provenance=PROVENANCE, **changes)


def rates(trial: optuna.Trial) -> dict[str, Any]:
    return {"schedule": "constant", "rate": trial.suggest_float("rate", 0.2, 0.5), "finetune_epochs": 1.0, "num_rounds": 3}


def forks(space: Any = rates, *found: tuple[RoundRecord, tuple[Action, ...]]) -> Forks:
    made = Forks(STUDY, space, TOKENS, seed=0)
    for record, actions in ((candidate(ROOT, 0.0, 0), ()), *found):
        made.observe(record, actions)
    return made


def fixed(**parameters: Any) -> optuna.trial.FixedTrial:
    return optuna.trial.FixedTrial(parameters)


def trained(*sparsities: float) -> tuple[Action, ...]:
    """As `rates` resolves it."""
    return tuple(Action(sparsity=sparsity, learning_rate=3e-4, finetune_tokens=1024, data_start_tokens=1024 * start)
                 for start, sparsity in enumerate(sparsities))


# ---- the round ----


def test_a_fork_is_the_first_round_of_a_configuration_on_what_the_parent_has_left() -> None:
    way = trained(0.4)
    made = forks(rates, (candidate("a", 0.4, 1), way))
    action = made.action(fixed(rate=0.25), made.frontier[1])
    assert (action.sparsity, action.data_start_tokens, action.finetune_tokens) == (pytest.approx(0.55, abs=1e-12), 1024, 1024)
    deep = forks(rates, (candidate("a", 0.86, 1), trained(0.86)))
    assert deep.action(fixed(rate=0.5), deep.frontier[1]).sparsity == 0.875  # the most that the space reaches
    beyond = forks(rates, (candidate("a", 0.9, 1), trained(0.9)))
    assert beyond.action(fixed(rate=0.5), beyond.frontier[1]).sparsity == 0.9


def test_the_next_round_of_a_trial_as_a_fork_has_the_key_that_the_trial_gives_it() -> None:
    """Also where the model has a few weights more or fewer than the action says."""
    whole = trained(0.25, 0.4375, 0.578125)
    made = forks(rates, (candidate("b", 0.437, 2), whole[:2]))
    action = made.action(fixed(rate=0.25), made.frontier[1])
    assert round_key("b", action) == round_key("b", whole[2])


def test_a_fork_by_threshold_cuts_at_the_threshold_and_of_units_each_pattern_counts_for_itself() -> None:
    def thresholds(trial: Any) -> dict[str, Any]:
        return {"schedule": "linear", "threshold": trial.suggest_float("threshold", 0.1, 1.0), "num_rounds": 4}

    made = forks(thresholds, (candidate("a", 0.4, 1), trained(0.4)))
    assert made.action(fixed(threshold=0.8), made.frontier[1]) == Action(threshold=0.8)

    def units(trial: Any) -> dict[str, Any]:
        pattern = trial.suggest_categorical("pattern", ["head", "unstructured", "2:4"])
        if pattern == "2:4":
            return {"pattern": pattern}
        return {"pattern": pattern, "target_sparsity": trial.suggest_float("target_sparsity", 0.2, 0.6)}

    heads = Action(pattern="head", sparsity=0.5)
    made = forks(units, (candidate("a", 0.1, 1), (heads,)), (candidate("b", 0.3, 2), (heads, Action(sparsity=0.3))))
    after_heads, after_both = made.frontier[1:]
    on = {pattern: [made.action(fixed(pattern=pattern, target_sparsity=0.2), parent).sparsity
                    for parent in (made.frontier[0], after_heads, after_both)] for pattern in ("head", "unstructured", "2:4")}
    assert on == {"head": [0.2, 0.6, 0.6], "unstructured": pytest.approx([0.2, 0.28, 0.44]), "2:4": [0.5, 0.5, 0.5]}


# ---- which round ----


def test_parents_are_of_the_frontier_and_not_trained_as_long_as_the_longest_trial() -> None:
    long = trained(0.2, 0.3, 0.4)
    made = forks(rates, (candidate("a", 0.2, 1), long[:1]), (candidate("b", 0.3, 2), long[:2]), (candidate("c", 0.4, 3), long),
                 (candidate("worse", 0.25, 1, shift=1.0), long[:1]), (candidate("raced", 0.6, 1, dominated_by="a"), long[:1]))
    assert [parent.record.key for parent in made.frontier] == [ROOT, "a", "b", "c"]
    chosen = {made.ask(number, ()).parent.record.key for number in range(40)}
    assert chosen == {ROOT, "a", "b"}
    better = forks(rates, (candidate("c", 0.4, 3, shift=-1.0), long))  # than the dense model, which no longer counts
    assert better.ask(0, ()).parent.record.key == "c"


def test_the_promise_is_expected_hypervolume_beside_what_runs() -> None:
    made = forks(rates, (candidate("a", 0.5, 1), trained(0.5)))  # sizes 1 and 0.6, bits 1 and 1.075 of the dense model
    certain = np.zeros((3, 2))
    means = np.array([[0.6, 1.075], [0.4, 1.2], [0.8, 1.05]])
    front = [[1.0, 1.0], [0.6, 1.075]]

    def gain(point: Any, *others: Any) -> float:
        points = [*front, *others]
        return hypervolume([*points, point], [False] * 2, [1, 2]) - hypervolume(points, [False] * 2, [1, 2])

    assert made.promise(means, certain) == pytest.approx([0.0, gain(means[1]), gain(means[2])])
    made._expected[7] = np.array([0.5, 1.1])  # runs
    assert made.promise(means, certain) == pytest.approx([0.0, *(gain(mean, [0.5, 1.1]) for mean in means[1:])])
    unsure = made.promise(means[:1], np.full((1, 2), 0.05))
    assert unsure[0] > 0  # it may be better than it is expected to be
    missed = np.hstack([means, [[-0.1], [0.2], [0.1]]])  # a constraint that the last two miss: none that keeps it gains
    assert made.promise(missed, np.zeros((3, 3))).argmax() == 0


def test_a_model_that_knows_the_rounds_takes_better_ones_than_chance() -> None:
    """Rounds of 0.2 to 0.5 of what is left; a learning rate above 1e-3 costs 0.5 bits, and half of an epoch half a second."""
    def space(trial: Any) -> dict[str, Any]:
        return {"schedule": "constant", "rate": trial.suggest_float("rate", 0.2, 0.5), "num_rounds": 3, "finetune_epochs": 1.0,
                "learning_rate": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}

    made = forks(space)
    rates_of_learning = []
    for number in range(30):
        fork = made.ask(number, ())
        shift = 0.5 * (fork.action.learning_rate > 1e-3)
        rates_of_learning.append(fork.action.learning_rate)
        made.ended(number)
        made.observe(candidate(f"{number}", fork.action.sparsity, 1, shift), (*fork.parent.actions, fork.action))
    assert np.mean(np.array(rates_of_learning[:8]) < 1e-3) < 0.8
    assert np.mean(np.array(rates_of_learning[-15:]) < 1e-3) > 0.85


@pytest.mark.parametrize("changes", [{}, {"gpus_per_rank": 0.0}, {"constraints": {"num_nonzero": 100}}])
def test_a_fork_says_what_it_is_expected_to_gain_for_a_gpu_hour(changes: dict[str, Any]) -> None:
    """Over the hypervolume of the frontier; nothing where rounds take no GPU, or where none keeps what is asked."""
    study = STUDY.replaced(**{"gpus_per_rank": 2.0, **changes})
    made, dense = Forks(study, rates, TOKENS, seed=0), candidate(ROOT, 0.0, 0)
    made.observe(dense, (), violations(dense, dense, study.search))
    for number in range(MIN_ROUNDS + 1):
        fork = made.ask(number, ())
        assert (fork.gain_per_gpu_hour is not None) == (number == MIN_ROUNDS and not changes)
        made.ended(number)
        found = candidate(f"{number}", fork.action.sparsity, 1).model_copy(update={"finetune_s": 9.0 if number else 0.0})
        made.observe(found, (*fork.parent.actions, fork.action), violations(found, dense, study.search))
    points = [[1 - 0.8 * parent.record.sparsity, 1 + 0.6 * parent.record.sparsity**3] for parent in made.frontier]
    share = 0.01 / hypervolume(points, [False] * 2, [1, 2])
    assert changes or made._per_gpu_hour(0.01) == pytest.approx(share / (2 * 8 / 3600), rel=1e-3)  # 8 s is the mean round


# ---- a rule of the user ----


def with_rule(rule: Any) -> Any:
    """The space of a module that has this `round`."""
    module = ModuleType("a_space")
    exec("def space(trial): return {'target_sparsity': trial.suggest_float('target_sparsity', 0.1, 0.9)}", module.__dict__)
    module.__dict__["round"] = rule
    return module


def test_a_module_may_say_what_a_fork_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module = with_rule(lambda trial, parent: {"sparsity": min(0.95, parent.sparsity + trial.suggest_float("step", 0.01, 0.1)),
                                              "finetune_tokens": 512, "learning_rate": 1e-3})
    monkeypatch.setitem(sys.modules, "a_space", module)
    made = forks(module.space, (candidate("a", 0.4, 1), trained(0.4)))
    assert made.action(fixed(step=0.1), made.frontier[1]) == Action(
        sparsity=0.5, finetune_tokens=512, learning_rate=1e-3, data_start_tokens=1024)


@pytest.mark.parametrize(("rule", "said"), [
    (lambda trial, parent: {"sparsity": 0.5, "threshold": 1.0}, "action 1: needs exactly one of sparsity and threshold"),
    (lambda trial, parent: {"sparsity": 2.0}, "action 1: sparsity must be at least 0 and below 1, got 2.0"),
    (lambda trial, parent: {"sparsety": 0.5}, "sparsety: no such field; the fields are criterion"),
    (lambda trial, parent: None, "must return a dict of an action's fields, got NoneType"),
    (lambda trial, parent: parent.nothing, "AttributeError: .*nothing.*; mend it"),
    (lambda trial, parent: {"sparsity": 0.5, "finetune_tokens": 100}, "finetune_tokens must be a multiple of batch_tokens")])
def test_a_rule_that_makes_no_action_is_told_in_one_sentence(rule: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = with_rule(rule)
    monkeypatch.setitem(sys.modules, "a_space", module)
    made = forks(module.space)
    for told in (lambda: made.action(fixed(), made.frontier[0]), lambda: check_rule(STUDY, module.space, TOKENS)):
        with pytest.raises(ValueError, match=rf"^round\(trial, parent\).*{said}"):
            told()
    check_rule(STUDY.replaced(sampler="tpe"), module.space, TOKENS)  # which makes no forks


def test_a_rule_that_asks_for_another_metric_is_believed_until_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = with_rule(lambda trial, parent: {"sparsity": 0.5 * parent.metrics["lambada/acc"].value})
    monkeypatch.setitem(sys.modules, "a_space", module)
    check_rule(STUDY, module.space, TOKENS)


# ---- the search ----


def searched(num_trials: int, ends: dict[int, str]) -> tuple[Sampler, list[TrialRecord], dict[str, RoundRecord]]:
    """So many trials one after the other, done but for those that `ends` names."""
    made = Sampler(optuna.create_study(directions=["minimize"] * 2), STUDY, rates, num_train_tokens=TOKENS)
    made.observe(None, candidate(ROOT, 0.0, 0))
    trials, rounds = [], {}
    for number in range(num_trials):
        asked, how = made.ask(), ends.get(number, "done")
        assert asked is not None
        keys = chain_of(asked.actions)[:len(asked.actions) if how == "done" else asked.forked_at or 0]
        trial = TrialRecord(number=number, config=asked.config, actions=asked.actions, parameters=asked.parameters,
                            distributions=asked.distributions, forked_at=asked.forked_at, keys=tuple(keys),
                            status="failed" if how in ("diverged", "crashed") else how, crashed=how == "crashed", started_at="")
        for depth, key in enumerate(keys, start=1):
            rounds.setdefault(key, candidate(key, asked.actions[depth - 1].sparsity, depth))
            if depth > (asked.forked_at or 0):
                made.observe(number, rounds[key])
        if how != "running":
            made.end(trial)
        trials.append(trial)
    return made, trials, rounds


def chain_of(actions: tuple[Action, ...], root: str = ROOT) -> list[str]:
    keys = [root]
    for action in actions:
        keys.append(round_key(keys[-1], action))
    return keys[1:]


def learned(made: Sampler) -> list[tuple]:
    """What the model is fitted to, in any order."""
    forks = made.forks
    return sorted((start.sparsity, str(action), list(target)) for (start, action), target in zip(forks._steps, forks._targets))


def test_after_the_first_trials_each_is_one_round_on_a_stored_candidate() -> None:
    made, trials, rounds = searched(20, {6: "diverged", 8: "crashed"})
    assert [trial.forked_at is None for trial in trials] == [True] * NUM_WHOLE + [False] * (20 - NUM_WHOLE)
    for trial in trials[NUM_WHOLE:]:
        assert len(trial.actions) == trial.forked_at + 1
        assert trial.config is None
        assert set(trial.parameters) == {"fork/rate"}
        assert trial.forked_at == 0 or chain_of(trial.actions)[trial.forked_at - 1] in rounds
    assert len({trial.actions for trial in trials}) == 20
    assert len(learned(made)) == len(rounds) + 1  # that diverged; the crashed one says nothing
    ((size, quality),) = [values for _, action, values in learned(made) if action == str(trials[6].actions[-1])]
    before = [rounds[trial.keys[-1]].metrics["text/bits_per_byte"].value / 2.0 for trial in trials[:6]]
    assert (size, quality) == (made.forks._starts[trials[6].actions[:-1]].losses[0], max(before))  # as bad as the worst
    assert not made.forks._expected
    journal = made.journal.get_trials(deepcopy=False)
    assert [trial.user_attrs.get("forked_at") for trial in journal] == [trial.forked_at for trial in trials]
    assert len(made.heard.get_trials(states=[TrialState.COMPLETE])) >= NUM_WHOLE  # of whole trials, and of their prefixes
    assert all("fork/rate" not in trial.params for trial in made.heard.trials)


def test_the_next_sweep_knows_every_fork_and_proposes_none_of_them() -> None:
    made, trials, rounds = searched(16, {6: "diverged", 8: "crashed", 15: "running"})
    again = Sampler(made.journal, STUDY, rates, num_train_tokens=TOKENS, num_asked=16)
    again.observe(None, candidate(ROOT, 0.0, 0))
    for trial in trials:
        again.recall(trial, rounds.get)
    assert learned(again) == learned(made)
    assert [parent[:2] for parent in again.forks.frontier] == [parent[:2] for parent in made.forks.frontier]
    assert len(again.heard.trials) == len(made.heard.trials)
    asked = again.ask()
    assert asked.number == 16
    assert asked.forked_at is not None
    assert asked.actions not in {trial.actions for trial in trials}
    last = trials[15]  # it runs again, and ends
    again.observe(15, candidate("last", last.actions[-1].sparsity, len(last.actions)))
    again.end(last.model_copy(update={"status": "done", "keys": (*last.keys, "last")}))
    assert len(learned(again)) == len(learned(made)) + 1


def test_the_same_search_twice_asks_for_the_same() -> None:
    one, two = searched(16, {}), searched(16, {})
    assert [trial.actions for trial in one[1]] == [trial.actions for trial in two[1]]


def test_a_study_can_forbid_forks_and_given_trials_are_whole() -> None:
    for sampler in (Sampler(optuna.create_study(directions=["minimize"] * 2), STUDY.replaced(sampler="tpe"), rates,
                            num_train_tokens=TOKENS),
                    Sampler(optuna.create_study(directions=["minimize"] * 2), STUDY, rates, [trained(0.5)] * 6,
                            num_train_tokens=TOKENS)):
        sampler.observe(None, candidate(ROOT, 0.0, 0))
        for number in range(6):
            asked = sampler.ask()
            sampler.observe(number, candidate(f"{number}", 0.1 * number, 1))
            assert asked.forked_at is None


def test_a_real_fork_runs_one_round_and_is_finished_by_the_next_sweep(study: Study, worker: Worker, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is killed when it has asked for a fork, and again when its gang has written the round but not the trial."""
    directory, ledger = tmp_path / "study", Ledger(tmp_path / "study")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def run(num_trials: int) -> list[str]:
        settings = study.replaced(num_trials=num_trials, dense_control=False)
        return sweep(directory, settings, worker, monkeypatch, lambda line: None)

    before = worker.ledger
    run(NUM_WHOLE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("raysearch.trial.run.run_round", killed)
        run(NUM_WHOLE + 1)
    fork = ledger.trial(NUM_WHOLE)
    assert (fork.status, len(fork.actions) - fork.forked_at) == ("running", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("raysearch.search.searcher.StudySearcher.on_trial_result", killed)
        run(NUM_WHOLE + 1)
    rounds = set(ledger.rounds())
    assert run(NUM_WHOLE + 2).count("trial") == 2
    again, last = ledger.trials()[-2:]
    assert again.model_copy(update={"status": "running"}).actions == fork.actions
    assert [trial.status for trial in (again, last)] == ["done", "done"]
    assert len(set(ledger.rounds()) - rounds) == 1  # that of the last fork alone
    chain = chain_of(again.actions, ledger.study().root_key)
    assert list(again.keys) == chain
    assert [ledger.candidate(key).parent for key in chain] == [ledger.study().root_key, *chain[:-1]]
    journal = open_journal(ledger, ledger.study().study, lambda line: pytest.fail(line))
    assert [trial.state for trial in journal.trials] == [TrialState.COMPLETE] * (NUM_WHOLE + 2)
    worker.ledger, worker.loaded_key = before, None
