"""From a configuration to its rounds: equal plans for equal paths, and what contradicts itself."""

import pytest

from raysearch.config import READ_BY, Action, Study, TrialConfig
from raysearch.pruning.criteria import CRITERIA
from raysearch.study.records import round_key
from raysearch.trial.actions import check_actions, control_actions, longest, resolve_actions


def test_two_ways_to_say_it_share_one_plan(study: Study) -> None:
    by_rate = resolve_actions(TrialConfig(schedule="constant", rate=0.2, num_rounds=3), study, 10**6)
    by_target = resolve_actions(TrialConfig(schedule="exponential", target_sparsity=1 - 0.8**3, num_rounds=3), study, 10**6)
    assert by_rate == by_target
    untouched = TrialConfig(target_sparsity=0.5, learning_rate=1.0, temperature=3.0)
    assert resolve_actions(untouched, study, 10**6) == resolve_actions(TrialConfig(target_sparsity=0.5), study, 10**6)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_reads_the_settings_of_what_it_does(name: str) -> None:
    each = CRITERIA[name]
    prunes_in_training = each.is_gradual or each.moves or each.is_soft or each.has_gates
    does = {"mask_interval_steps": prunes_in_training, "mask_decay": each.trains_pruned, "drop_fraction": each.moves,
            "score_rate": each.is_soft or each.has_gates, "score_penalty": each.is_soft, "gate_penalty": each.has_gates,
            "calibration_sequences": each.statistic is not None or each.by_sequence or each.by_contribution
            or each.by_activation}
    assert {setting: name in criteria for setting, criteria in READ_BY.items()} == does


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
    ({"target_sparsity": 0.5, "distill_alpha": 0.1}, "distill_alpha acts during fine-tuning, .*got distill_alpha 0.1"),
    ({"target_sparsity": 0.5, "distill_hidden": 0.1}, "distill_hidden acts during fine-tuning, .*got distill_hidden 0.1"),
    ({"threshold": 0.1, "num_rounds": 2}, "num_rounds with schedule one_shot must be 1, got 2"),
    ({"target_sparsity": 0.2, "initial_sparsity": 0.3}, "target_sparsity .*0.2"),
    ({"rate": 0.2, "target_sparsity": 0.5}, "rate"),
    ({"target_sparsity": 0.5, "criterion": "luck"}, "criterion must be one of magnitude, l2, gradual_magnitude, .*'luck'"),
    ({"target_sparsity": 0.5, "criterion": "gradual_magnitude"}, "criterion gradual_magnitude prunes during fine-tuning, so"),
    ({"threshold": 0.5, "criterion": "gradual_magnitude", "finetune_epochs": 1.0}, "ranks, and has no scale for a cut"),
    ({"target_sparsity": 0.5, "pattern": "4:4"}, "pattern must be one of unstructured, head, neuron, .*got '4:4'"),
    ({"target_sparsity": 0.6, "pattern": "2:4"}, "pattern 2:4 ends at sparsity 0.5, so target_sparsity must be that.*got 0.6"),
    ({"schedule": "constant", "rate": 0.1, "num_rounds": 2, "pattern": "1:4"}, "pattern 1:4 ends at sparsity 0.75.*got None"),
    ({"threshold": 0.1, "pattern": "2:4"}, "pattern 2:4 compares the weights of each 4.*threshold 0.1"),
    ({"target_sparsity": 0.5, "criterion": "wanda"}, "criterion wanda prunes block by block, so it needs scope layer or row"),
    ({"threshold": 0.5, "criterion": "ria"}, "criterion ria prunes block by block, .*threshold 0.5"),
    ({"target_sparsity": 0.5, "criterion": "ria", "pattern": "head", "scope": "layer"}, "criterion ria prunes block by block"),
    ({"target_sparsity": 0.5, "criterion": "sparsegpt", "scope": "row"}, "criterion sparsegpt .*must be layer, got row"),
    ({"criterion": "wanda", "pattern": "2:4", "schedule": "linear", "num_rounds": 2}, "prunes to pattern 2:4 at once, so its"),
    ({"target_sparsity": 0.5, "budget": "erdos_renyi"}, "budget erdos_renyi shares single weights out among .*and global"),
    ({"target_sparsity": 0.5, "budget": "erdos_renyi", "scope": "layer", "pattern": "head"}, "budget erdos_renyi .*got head"),
    ({"target_sparsity": 0.5, "budget": "owl"}, "budget owl shares single weights out among .*and global"),
    ({"pattern": "4:8", "scope": "layer"}, "pattern 4:8 compares the weights of each 8.*got scope layer"),
    ({"target_sparsity": 0.5, "criterion": "l0"}, "criterion l0 learns gates of heads or neurons, .*got unstructured"),
    ({"target_sparsity": 0.5, "criterion": "activation"}, "criterion activation looks at the outputs of heads .*unstructured"),
    ({"target_sparsity": 0.5, "criterion": "activation", "pattern": "block"}, "needs pattern head or neuron, got block"),
    ({"threshold": 0.5, "criterion": "activation", "pattern": "head"}, "activation ranks, and has no scale for a cut"),
    ({"target_sparsity": 0.5, "criterion": "l0", "pattern": "layer"}, "criterion l0 learns gates .*got layer"),
    ({"target_sparsity": 0.5, "criterion": "l0", "pattern": "head"}, "criterion l0 prunes during fine-tuning, so finetune_epo"),
    ({"threshold": 0.5, "criterion": "l0", "pattern": "head", "finetune_epochs": 1.0}, "criterion l0 ranks, and has no scale"),
    ({"target_sparsity": 0.5, "criterion": "taylor", "pattern": "block"}, "pattern block has units that are parts of rows"),
    ({"target_sparsity": 0.5, "group_lambda": 0.1, "pattern": "hybrid"}, "pattern hybrid has units that are parts .*0.1"),
    ({"target_sparsity": 0.5, "pattern": "block64", "scope": "row"}, "pattern block64 is ranked over"),
    ({"target_sparsity": 0.5, "layer_drop": 0.1}, "layer_drop acts during fine-tuning"),
    ({"target_sparsity": 0.5, "layer_drop": 0.1, "criterion": "movement", "finetune_epochs": 1.0}, "layer_drop leaves layers"),
    ({"target_sparsity": 0.5, "trainable": "vectors", "criterion": "rigl", "finetune_epochs": 1.0}, "trainable vectors leaves"),
    ({"target_sparsity": 0.5, "trainable": "vectors", "l1_lambda": 0.1, "finetune_epochs": 1.0}, "vectors leaves .* 0.1 and 0"),
    ({"target_sparsity": 0.5, "group_lambda": 0.1}, "group_lambda shrinks whole units, .*got pattern unstructured"),
    ({"pattern": "2:4", "group_lambda": 0.1}, "group_lambda shrinks whole units, .*got pattern 2:4"),
    ({"target_sparsity": 0.5, "group_lambda": 0.1, "pattern": "head", "criterion": "l0"}, "than l0, whose gates shrink them"),
    ({"target_sparsity": 0.5, "group_lambda": 0.1, "pattern": "head"}, "group_lambda acts during fine-tuning"),
    ({"target_sparsity": 0.5, "criterion": "movement"}, "criterion movement prunes during fine-tuning, so finetune_epochs"),
    ({"threshold": 0.5, "criterion": "movement", "finetune_epochs": 1.0}, "criterion movement ranks, and has no scale"),
    ({"threshold": 0.5, "criterion": "taylor"}, "criterion taylor ranks, and has no scale for a cut"),
    ({"threshold": 0.5, "criterion": "set", "finetune_epochs": 1.0}, "criterion set ranks, and has no scale"),
    ({"target_sparsity": 0.5, "criterion": "soft_movement", "finetune_epochs": 1.0}, "criterion soft_movement cuts .*old None"),
    ({"threshold": 1.5, "criterion": "soft_movement", "finetune_epochs": 1.0}, "below 1 and pattern un.*threshold 1.5, abs"),
    ({"threshold": 0.5, "criterion": "soft_movement", "threshold_unit": "std", "finetune_epochs": 1.0}, "threshold 0.5, std"),
    ({"threshold": 0.1, "criterion": "soft_movement", "pattern": "head", "finetune_epochs": 1.0}, "absolute, and head"),
    ({"threshold": 0.1, "criterion": "soft_movement"}, "criterion soft_movement prunes during fine-tuning, so finetune_epochs"),
    ({"target_sparsity": 0.5, "criterion": "rigl"}, "criterion rigl prunes during fine-tuning, so finetune_epochs"),
    ({"target_sparsity": 0.5, "criterion": "rigl", "scope": "row", "finetune_epochs": 1.0}, "within a layer, .*ed and row"),
    ({"criterion": "set", "pattern": "2:4", "finetune_epochs": 1.0}, "criterion set drops and grows .*got 2:4 and global"),
    ({"target_sparsity": 0.5, "pattern": "head", "scope": "row"}, "pattern head is ranked over the model or a layer"),
    ({"target_sparsity": 0.5, "criterion": "l2"}, "criterion l2 is a norm of units, .*got unstructured; magnitude"),
    ({"criterion": "l2", "pattern": "2:4"}, "criterion l2 is a norm of units, so it needs pattern head, .*got 2:4"),
    ({"target_sparsity": 0.5, "criterion": "top"}, "criterion top with pattern unstructured: .*need pattern layer and no thr"),
    ({"threshold": 0.5, "criterion": "contribution", "pattern": "layer"}, "need pattern layer and no threshold.*0.5"),
    ({"target_sparsity": 0.5, "pattern": "layer", "scope": "layer"}, "layers are compared with each other, .*got scope layer"),
    ({"target_sparsity": 0.5, "uniform": True, "pattern": "layer"}, "uniform keeps as many .*got layer and global"),
    ({"target_sparsity": 0.5, "pattern": "neuron", "scope": "row"}, "pattern neuron is ranked over the model or a layer"),
    ({"target_sparsity": 0.5, "pattern": "neuron", "criterion": "rigl", "finetune_epochs": 1.0}, "rigl drops .*got neuron"),
    ({"target_sparsity": 0.5, "uniform": True, "scope": "layer"}, "uniform keeps as many .*got unstructured and layer"),
    ({"target_sparsity": 0.5, "uniform": True, "pattern": "neuron"}, "needs pattern head or .*got neuron and global"),
    ({"pattern": "2:4", "uniform": True}, "uniform keeps as many .*got 2:4 and global"),
    ({"threshold": 0.5, "pattern": "head", "threshold_unit": "std"}, "pattern head is ranked over the model or a layer"),
])
def test_contradictions_are_refused(study: Study, fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve_actions(TrialConfig(**fields), study, 10**6)


def test_n_of_m_has_a_sparsity_of_its_own(study: Study) -> None:
    (said,), (unsaid,) = (resolve_actions(TrialConfig(pattern="2:3", target_sparsity=target), study, 10**6)
                          for target in (1 / 3, None))
    assert said == unsaid
    path = resolve_actions(TrialConfig(pattern="2:8", schedule="linear", num_rounds=3), study, 10**6)
    assert [action.sparsity for action in path] == [0.25, 0.5, 0.75]
    check_actions(path, study, 10**6, "line 1")


def test_masks_move_only_where_the_criterion_is_gradual(study: Study) -> None:
    learning = {"target_sparsity": 0.5, "finetune_epochs": 1.0, "mask_interval_steps": 7}
    (movement,) = resolve_actions(TrialConfig(criterion="movement", **learning), study, 10**6)
    (gradual,) = resolve_actions(TrialConfig(criterion="gradual_magnitude", **learning), study, 10**6)
    (magnitude,) = resolve_actions(TrialConfig(**learning), study, 10**6)
    assert [a.mask_interval_steps for a in (movement, gradual, magnitude)] == [7, 7, 0]


@pytest.mark.parametrize(("fields", "sentence"), [
    ({}, "needs exactly one of sparsity and threshold, got None and None"),
    ({"sparsity": 0.5, "threshold": 0.1}, "needs exactly one of sparsity and threshold, got 0.5 and 0.1"),
    ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, got 1.0"),
    ({"sparsity": 0.5, "criterion": "luck"}, "criterion must be one of"),
    ({"sparsity": 0.5, "pattern": "luck"}, "pattern must be one of"),
    ({"sparsity": 0.6, "pattern": "2:4"}, "pattern 2:4 ends at sparsity 0.5, got 0.6"),
    ({"sparsity": 0.5, "budget": "erdos_renyi"}, "budget erdos_renyi shares single weights out among layers, so it needs"),
    ({"threshold": 0.6, "pattern": "2:4"}, "pattern 2:4 compares the weights of each 4"),
    ({"threshold": 0.1, "criterion": "soft_movement", "finetune_tokens": 256, "mask_interval_steps": 1}, ".*a score_rate"),
    ({"sparsity": 0.5, "criterion": "l0", "pattern": "head", "finetune_tokens": 256, "mask_interval_steps": 1},
     "criterion l0 needs a score_rate"),
    ({"sparsity": 0.5, "criterion": "taylor"}, "criterion taylor needs calibration_sequences, got 0"),
    ({"sparsity": 0.5, "budget": "owl", "scope": "layer"}, "budget owl needs calibration_sequences, got 0"),
    ({"sparsity": 0.5, "budget": "owl", "scope": "layer", "calibration_sequences": 2, "owl_lambda": 0.1},
     "budget owl needs owl_lambda of 0 to 1 and owl_m above 0, got 0.1 and 0.0"),
    ({"sparsity": 0.5, "criterion": "wanda", "scope": "row"}, "criterion wanda needs calibration_sequences, got 0"),
    ({"sparsity": 0.4, "criterion": "ria", "pattern": "2:4", "calibration_sequences": 2}, "criterion ria prunes to pattern"),
    ({"sparsity": 0.5, "distill_alpha": 1.1}, "distill_alpha must be 0 to 1 and temperature above 0, got 1.1 and 1.0"),
    ({"sparsity": 0.5, "finetune_tokens": 100}, "finetune_tokens must be a multiple of batch_tokens = 256, got 100"),
    ({"sparsity": 0.5, "finetune_tokens": 256, "data_start_tokens": 3}, "data_start_tokens must be a multiple of context"),
    ({"sparsity": 0.5, "criterion": "movement"}, "criterion movement prunes during fine-tuning: it needs finetune_to"),
    ({"sparsity": 0.5, "criterion": "rigl", "finetune_tokens": 256, "mask_interval_steps": 1}, "criterion rigl needs a drop"),
    ({"sparsity": 0.5, "finetune_tokens": 256, "learning_rate": -1.0},
     "l1_lambda, group_lambda, learning_rate, mask_decay and distill_hidden must be at least 0"),
])
def test_actions_that_were_written_by_hand_are_checked(study: Study, fields: dict, sentence: str) -> None:
    good = Action(sparsity=0.3)
    check_actions([good], study, 10**6, "line 1")
    with pytest.raises(ValueError, match=f"line 1, action 2: {sentence}"):
        check_actions([good, Action(**fields)], study, 10**6, "line 1")


def test_calibration_needs_text_and_matrices(study: Study) -> None:
    config = TrialConfig(criterion="wanda", scope="row", target_sparsity=0.5, calibration_sequences=8)
    (action,) = resolve_actions(config, study.replaced(seed=3), 10**6)
    assert (action.calibration_sequences, action.seed) == (8, 3)
    (magnitude,) = resolve_actions(config.model_copy(update={"criterion": "magnitude"}), study.replaced(seed=3), 10**6)
    assert (magnitude.calibration_sequences, magnitude.seed) == (0, 0)
    with pytest.raises(ValueError, match="criterion wanda looks at training text, got no corpus"):
        resolve_actions(config, study, 0)
    with pytest.raises(ValueError, match="criterion wanda looks at the inputs of a block's matrices, so prunable must be matr"):
        resolve_actions(config, study.replaced(prunable="all"), 10**6)
    (action,) = resolve_actions(TrialConfig(criterion="taylor", target_sparsity=0.5), study.replaced(prunable="all"), 10**6)
    assert (action.calibration_sequences, action.scope) == (128, "global")
    owl = TrialConfig(budget="owl", scope="layer", target_sparsity=0.5, owl_m=3.0)
    (action,) = resolve_actions(owl, study.replaced(seed=3), 10**6)
    assert (action.calibration_sequences, action.seed, action.owl_lambda, action.owl_m) == (128, 3, 0.08, 3.0)
    with pytest.raises(ValueError, match="budget owl looks at training text, got no corpus"):
        resolve_actions(owl, study, 0)
    with pytest.raises(ValueError, match="budget owl looks at the inputs of a block's matrices, so prunable must be matrices"):
        resolve_actions(owl, study.replaced(prunable="all"), 10**6)


def test_actions_that_train_need_text(study: Study) -> None:
    with pytest.raises(ValueError, match="needs text to train on, got no corpus"):
        check_actions([Action(sparsity=0.5, finetune_tokens=256)], study, 0, "line 1")


def test_a_control_trains_as_its_trial_does_and_prunes_nothing(study: Study) -> None:
    config = TrialConfig(schedule="linear", target_sparsity=0.6, num_rounds=2, finetune_epochs=0.5, l1_lambda=1e-4,
                         learning_rate=1e-3, criterion="movement", scope="layer", lr_schedule="one_cycle")
    actions = resolve_actions(config, study.replaced(seed=3), 10**6)
    assert control_actions(actions) == (
        Action(sparsity=0.0, learning_rate=1e-3, lr_schedule="one_cycle", finetune_tokens=512, data_start_tokens=0, seed=3),
        Action(sparsity=0.0, learning_rate=1e-3, lr_schedule="one_cycle", finetune_tokens=512, data_start_tokens=512, seed=3))
    by_threshold = TrialConfig(threshold=0.5, threshold_unit="std", schedule="linear", num_rounds=2, finetune_epochs=0.5,
                               learning_rate=1e-3, lr_schedule="one_cycle")
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
