"""From a configuration to its rounds: equal plans for equal paths, and what contradicts itself."""

import pytest

from raysearch.config import Action, Study, TrialConfig
from raysearch.study.records import round_key
from raysearch.trial.actions import control_actions, longest, resolve_actions


def test_two_ways_to_say_it_share_one_plan(study: Study) -> None:
    by_rate = resolve_actions(TrialConfig(schedule="constant", rate=0.2, num_rounds=3), study, 10**6)
    by_target = resolve_actions(TrialConfig(schedule="exponential", target_sparsity=1 - 0.8**3, num_rounds=3), study, 10**6)
    assert by_rate == by_target
    untouched = TrialConfig(target_sparsity=0.5, learning_rate=1.0)
    assert resolve_actions(untouched, study, 10**6) == resolve_actions(TrialConfig(target_sparsity=0.5), study, 10**6)


def test_the_papers_rates_are_five_rounds(study: Study) -> None:
    keys = set()
    for target, num_rounds in ((0.1, 1), (0.3, 3), (0.5, 5)):
        key = "root"
        for action in resolve_actions(TrialConfig(schedule="linear", target_sparsity=target, num_rounds=num_rounds,
                                                  finetune_epochs=1.0), study, 10**6):
            key = round_key(key, action)
            keys.add(key)
    assert len(keys) == 5


def test_rounds_read_on_in_the_data(study: Study) -> None:
    actions = resolve_actions(TrialConfig(schedule="linear", target_sparsity=0.5, num_rounds=3, finetune_epochs=0.5), study,
                              10**6)
    assert [(a.data_start_tokens, a.finetune_tokens) for a in actions] == [(0, 512), (512, 512), (1024, 512)]


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"target_sparsity": 0.5, "finetune_epochs": 0.01}, "finetune_epochs must be 0 or make at least one step of 256 tokens"),
    ({"target_sparsity": 0.5, "l1_lambda": 0.1}, "l1_lambda acts during fine-tuning"),
    ({"threshold": 0.1, "num_rounds": 2}, "num_rounds with schedule one_shot must be 1, got 2"),
    ({"target_sparsity": 0.2, "initial_sparsity": 0.3}, "target_sparsity .*0.2"),
    ({"rate": 0.2, "target_sparsity": 0.5}, "rate"),
])
def test_contradictions_are_refused(study: Study, fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve_actions(TrialConfig(**fields), study, 10**6)


def test_a_control_trains_as_its_trial_does_and_prunes_nothing(study: Study) -> None:
    config = TrialConfig(schedule="linear", target_sparsity=0.6, num_rounds=2, finetune_epochs=0.5, l1_lambda=1e-4,
                         learning_rate=1e-3, criterion="movement", scope="layer")
    actions = resolve_actions(config, study.replaced(seed=3), 10**6)
    assert control_actions(actions) == (
        Action(sparsity=0.0, learning_rate=1e-3, finetune_tokens=512, data_start_tokens=0, seed=3),
        Action(sparsity=0.0, learning_rate=1e-3, finetune_tokens=512, data_start_tokens=512, seed=3))
    by_threshold = TrialConfig(threshold=0.5, threshold_unit="std", schedule="linear", num_rounds=2, finetune_epochs=0.5,
                               learning_rate=1e-3)
    assert control_actions(resolve_actions(by_threshold, study.replaced(seed=3), 10**6)) == control_actions(actions)


def test_without_fine_tuning_there_is_no_control(study: Study) -> None:
    assert control_actions(resolve_actions(TrialConfig(target_sparsity=0.5), study, 10**6)) == ()
    assert control_actions(()) == ()


def test_the_longest_trial_has_most_tokens_in_all() -> None:
    short, long, as_long = ([Action(sparsity=sparsity, finetune_tokens=tokens)] * number
                            for sparsity, tokens, number in ((0.1, 900, 1), (0.2, 500, 2), (0.3, 250, 4)))
    assert longest([short, long, as_long]) == long
    assert longest([short, as_long, long]) == as_long
    assert longest([]) == ()
