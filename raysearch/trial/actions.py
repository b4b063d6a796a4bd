"""From a trial's configuration to its list of actions, before anything runs; and from there to the dense control's."""

from collections.abc import Sequence

from raysearch.config import READ_BY, WHILE_TRAINING, Action, Study, TrialConfig
from raysearch.pruning.criteria import CRITERIA
from raysearch.pruning.patterns import NOfM, n_of_m
from raysearch.pruning.schedules import resolve_schedule
from raysearch.pruning.sparsegpt import WIDTH


def check_names(method: TrialConfig | Action) -> NOfM | None:
    """ValueError of one sentence for a criterion or a pattern that there is not; the pattern's N:M."""
    if method.criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {method.criterion!r}")
    return n_of_m(method.pattern)


def looks_at_text(method: TrialConfig | Action) -> bool:
    return method.criterion in READ_BY["calibration_sequences"] or method.budget == "owl"


def changes_masks(method: TrialConfig | Action) -> bool:
    """Whether masks change while it fine-tunes."""
    return method.criterion in READ_BY["mask_interval_steps"]


def _check_method(method: TrialConfig | Action, study: Study, num_train_tokens: int) -> NOfM | None:
    """ValueError for a criterion, a pattern and a scope that do not go together, or not with the study; the pattern's N:M."""
    criterion, pattern, scope = method.criterion, method.pattern, method.scope
    group = check_names(method)
    if group is not None and (method.threshold is not None or scope != "global"):
        raise ValueError(f"pattern {pattern} compares the weights of each {group.size}, so scope stays global and a threshold "
                         f"does not go with it, got scope {scope} and threshold {method.threshold}")
    if group is None and pattern != "unstructured" and (scope == "row" or method.threshold_unit == "std"):
        raise ValueError(f"pattern {pattern} is ranked over the model or a layer, by absolute scores, so scope row and "
                         f"threshold_unit std do not go with it, got {scope} and {method.threshold_unit}")
    if criterion == "l2" and (group is not None or pattern == "unstructured"):
        raise ValueError(f"criterion l2 is a norm of units, so it needs pattern head, neuron or another of units, got "
                         f"{pattern}; magnitude ranks single weights alike")
    ranks_layers = CRITERIA[criterion].order is not None or CRITERIA[criterion].by_contribution
    if (ranks_layers and (pattern != "layer" or method.threshold is not None)) or (pattern == "layer" and scope != "global"):
        raise ValueError(f"criterion {criterion} with pattern {pattern}: layers are compared with each other, so pattern layer "
                         f"needs scope global, and top, bottom, alternate, symmetric and contribution need pattern layer and "
                         f"no threshold, got scope {scope} and threshold {method.threshold}")
    of_units = group is None and pattern != "unstructured"
    by_activation = CRITERIA[criterion].by_activation
    if (CRITERIA[criterion].has_gates or by_activation) and pattern not in ("head", "neuron"):
        raise ValueError(f"criterion {criterion} {'looks at the outputs' if by_activation else 'learns gates'} of heads or "
                         f"neurons, so it needs pattern head or neuron, got {pattern}")
    lies_across = pattern in ("block", "block64", "hybrid")
    if lies_across and (CRITERIA[criterion].by_sequence or method.group_lambda):
        raise ValueError(f"pattern {pattern} has units that are parts of rows, which criterion taylor and group_lambda do not "
                         f"take; give another pattern, got criterion {criterion} and group_lambda {method.group_lambda:g}")
    if method.group_lambda and (not of_units or CRITERIA[criterion].has_gates):
        raise ValueError(f"group_lambda shrinks whole units, so it needs pattern head, neuron or layer and another criterion "
                         f"than l0, whose gates shrink them, got pattern {pattern} and criterion {criterion}")
    if method.layer_drop and (changes_masks(method) or method.group_lambda):
        raise ValueError(f"layer_drop leaves layers out whose masks stay, so it needs a criterion that prunes at once and no "
                         f"group_lambda, got criterion {criterion} and group_lambda {method.group_lambda:g}")
    if method.trainable == "vectors" and (changes_masks(method) or method.group_lambda or method.l1_lambda):
        raise ValueError(f"trainable vectors leaves matrices as they are, so it needs a criterion that prunes at once, and "
                         f"l1_lambda and group_lambda 0, got criterion {criterion}, {method.l1_lambda:g} and "
                         f"{method.group_lambda:g}")
    if method.uniform and (pattern not in ("head", "neuron") or scope != "layer"):
        raise ValueError(f"uniform keeps as many heads or neurons in every layer, so it needs pattern head or neuron and scope "
                         f"layer, got {pattern} and {scope}")
    if method.budget != "uniform" and (pattern != "unstructured" or scope == "global"):
        raise ValueError(f"budget {method.budget} shares single weights out among layers, so it needs pattern unstructured and "
                         f"scope layer or row, got {pattern} and {scope}")
    calibrates = CRITERIA[criterion].statistic is not None
    if calibrates and group is None and (pattern != "unstructured" or scope == "global" or method.threshold is not None):
        raise ValueError(f"criterion {criterion} prunes block by block, so it needs scope layer or row without a threshold, or "
                         f"a pattern N:M, got pattern {pattern}, scope {scope} and threshold {method.threshold}")
    if CRITERIA[criterion].solve is not None and scope == "row":
        raise ValueError(f"criterion {criterion} compares the weights of all outputs of {WIDTH} inputs, so scope must be "
                         f"layer, got {scope}")
    reader = "budget owl" if method.budget == "owl" else f"criterion {criterion}"
    if (calibrates or method.budget == "owl") and study.model.prunable != "matrices":
        raise ValueError(f"{reader} looks at the inputs of a block's matrices, so prunable must be matrices, "
                         f"got {study.model.prunable}")
    if looks_at_text(method) and not num_train_tokens:
        raise ValueError(f"{reader} looks at training text, got no corpus")
    is_soft = CRITERIA[criterion].is_soft
    ranks = changes_masks(method) or CRITERIA[criterion].by_sequence or by_activation
    if ranks and method.threshold is not None and not is_soft:
        raise ValueError(f"criterion {criterion} ranks, and has no scale for a cut, so it needs target_sparsity or rate, got "
                         f"threshold {method.threshold:g}")
    if is_soft and (method.threshold is None or method.threshold >= 1 or method.threshold_unit == "std"
                    or pattern != "unstructured"):
        raise ValueError(f"criterion {criterion} cuts each weight by the sigmoid of its score, so it needs an absolute "
                         f"threshold below 1 and pattern unstructured, got threshold {method.threshold}, "
                         f"{method.threshold_unit}, and {pattern}")
    if CRITERIA[criterion].moves and (pattern != "unstructured" or scope == "row"):
        raise ValueError(f"criterion {criterion} drops and grows single weights within a layer, so it needs pattern "
                         f"unstructured and scope global or layer, got {pattern} and {scope}")
    return group


def check_actions(actions: Sequence[Action], study: Study, num_train_tokens: int, where: str) -> None:
    """ValueError of one sentence, with `where`, for actions that were written by hand and contradict themselves."""
    batch_tokens, context_tokens = study.training.batch_tokens, study.data.context_tokens
    for number, action in enumerate(actions, start=1):
        try:
            group = _check_method(action, study, num_train_tokens)
        except ValueError as error:
            raise ValueError(f"{where}, action {number}: {error}") from error
        criterion = CRITERIA[action.criterion]
        calibrates = criterion.statistic is not None
        rules = (
            ((action.sparsity is None) != (action.threshold is None),
             f"needs exactly one of sparsity and threshold, got {action.sparsity} and {action.threshold}"),
            (action.sparsity is None or 0 <= action.sparsity < 1,
             f"sparsity must be at least 0 and below 1, got {action.sparsity}"),
            (group is None or (action.sparsity or 0) <= group.sparsity,
             f"pattern {action.pattern} ends at sparsity {group and group.sparsity}, got {action.sparsity}"),
            (not looks_at_text(action) or action.calibration_sequences > 0,
             f"{'budget owl' if action.budget == 'owl' else 'criterion ' + action.criterion} needs calibration_sequences, got "
             f"{action.calibration_sequences}"),
            (action.budget != "owl" or (0 <= action.owl_lambda <= 1 and action.owl_m > 0),
             f"budget owl needs owl_lambda of 0 to 1 and owl_m above 0, got {action.owl_lambda} and {action.owl_m}"),
            (not (calibrates and group) or action.sparsity == group.sparsity,
             f"criterion {action.criterion} prunes to pattern {action.pattern} at once, got sparsity {action.sparsity}"),
            (action.finetune_tokens >= 0 and action.finetune_tokens % batch_tokens == 0,
             f"finetune_tokens must be a multiple of batch_tokens = {batch_tokens}, got {action.finetune_tokens}"),
            (action.data_start_tokens >= 0 and action.data_start_tokens % context_tokens == 0,
             f"data_start_tokens must be a multiple of context_tokens = {context_tokens}, got {action.data_start_tokens}"),
            (not action.finetune_tokens or num_train_tokens > 0,
             f"finetune_tokens {action.finetune_tokens} needs text to train on, got no corpus"),
            (not changes_masks(action) or min(action.finetune_tokens, action.mask_interval_steps) > 0,
             f"criterion {action.criterion} prunes during fine-tuning: it needs finetune_tokens and mask_interval_steps"),
            (not criterion.is_soft or (action.score_rate > 0 and action.score_penalty >= 0),
             f"criterion {action.criterion} needs a score_rate above 0 and a score_penalty of at least 0, got "
             f"{action.score_rate} and {action.score_penalty}"),
            (not criterion.has_gates or (action.score_rate > 0 and action.gate_penalty >= 0),
             f"criterion {action.criterion} needs a score_rate above 0 and a gate_penalty of at least 0, got "
             f"{action.score_rate} and {action.gate_penalty}"),
            (not criterion.moves or 0 < action.drop_fraction <= 1,
             f"criterion {action.criterion} needs a drop_fraction above 0 and at most 1, got {action.drop_fraction}"),
            (0 <= action.layer_drop < 1 and (not action.layer_drop or action.finetune_tokens > 0),
             f"layer_drop must be at least 0 and below 1, and needs finetune_tokens, got {action.layer_drop}"),
            (min(action.l1_lambda, action.group_lambda, action.learning_rate, action.mask_decay, action.distill_hidden) >= 0,
             "l1_lambda, group_lambda, learning_rate, mask_decay and distill_hidden must be at least 0"),
            (0 <= action.distill_alpha <= 1 and action.temperature > 0,
             f"distill_alpha must be 0 to 1 and temperature above 0, got {action.distill_alpha} and {action.temperature}"),
        )
        for holds, rule in rules:
            if not holds:
                raise ValueError(f"{where}, action {number}: {rule}")


def resolve_actions(config: TrialConfig, study: Study, num_train_tokens: int) -> tuple[Action, ...]:
    """The trial as a list of rounds; configurations that do the same thing give equal lists.

    `num_train_tokens` is the size of the train split (0 without a corpus). Raises ValueError for contradictions.
    """
    group, target_sparsity = _check_method(config, study, num_train_tokens), config.target_sparsity
    if group is not None and config.rate is None and target_sparsity is None:
        target_sparsity = group.sparsity
    if group is not None and (target_sparsity is None or round(target_sparsity, 12) != group.sparsity):
        raise ValueError(f"pattern {config.pattern} ends at sparsity {group.sparsity:g}, so target_sparsity must be that, or "
                         f"absent without a rate, got {target_sparsity}")
    epoch_tokens = min(study.data.epoch_tokens or num_train_tokens, num_train_tokens)
    num_steps = round(config.finetune_epochs * epoch_tokens / study.training.batch_tokens)
    if config.finetune_epochs and not num_steps:
        raise ValueError(f"finetune_epochs must be 0 or make at least one step of {study.training.batch_tokens} tokens, got "
                         f"{config.finetune_epochs:g} epochs of {epoch_tokens} tokens; raise it, or give a corpus")
    for field in ("l1_lambda", "group_lambda", "layer_drop", "distill_alpha", "distill_hidden"):
        if (value := getattr(config, field)) and not num_steps:
            raise ValueError(f"{field} acts during fine-tuning, so finetune_epochs must be above 0 with it, got {field} "
                             f"{value:g} and finetune_epochs 0")
    if changes_masks(config) and not num_steps:
        raise ValueError(f"criterion {config.criterion} prunes during fine-tuning, so finetune_epochs must be above 0 with it, "
                         "got 0")
    if config.threshold is not None:
        num_rounds = config.num_rounds or 1
        if config.schedule == "one_shot" and num_rounds > 1:
            raise ValueError(f"num_rounds with schedule one_shot must be 1, got {num_rounds}; linear raises the "
                             "threshold over the rounds")
        cuts = [{"threshold": round(config.threshold * k / num_rounds, 12)} for k in range(1, num_rounds + 1)]
    else:
        cuts = [{"sparsity": sparsity} for sparsity in resolve_schedule(
            config.schedule, initial_sparsity=config.initial_sparsity, target_sparsity=target_sparsity,
            num_rounds=config.num_rounds, rate=config.rate)]
    calibrates = CRITERIA[config.criterion].statistic is not None
    if calibrates and group is not None and len(cuts) > 1:
        raise ValueError(f"criterion {config.criterion} prunes to pattern {config.pattern} at once, so its schedule must be "
                         f"one_shot, got {config.schedule} of {len(cuts)} rounds")
    read = {"criterion", "pattern", "scope", "uniform", "budget", "threshold_unit"}
    read |= {name for name, criteria in READ_BY.items() if config.criterion in criteria}
    read |= {"owl_lambda", "owl_m", "calibration_sequences"} if config.budget == "owl" else set()
    read |= {*WHILE_TRAINING} if num_steps else set()
    read |= {"temperature"} if config.distill_alpha else set()
    fixed = config.model_dump(include=read) | ({"seed": study.data.seed} if num_steps or looks_at_text(config) else {})
    tokens = num_steps * study.training.batch_tokens
    return tuple(Action(**fixed, **cut, finetune_tokens=tokens, data_start_tokens=index * tokens)
                 for index, cut in enumerate(cuts))


def longest(trials: Sequence[Sequence[Action]]) -> Sequence[Action]:
    """The list of actions that trains on most tokens in all; of equal ones the first; () where there is none."""
    return max(trials, key=lambda actions: sum(action.finetune_tokens for action in actions), default=())


def control_actions(actions: Sequence[Action]) -> tuple[Action, ...]:
    """The fine-tuning of these rounds, on the same text, and nothing else: what the dense model gains from it alone.

    () where nothing is fine-tuned: the control would be the dense model.
    """
    if not any(action.finetune_tokens for action in actions):
        return ()
    fields = {"learning_rate", "lr_schedule", "finetune_tokens", "data_start_tokens", "seed"}
    return tuple(Action(sparsity=0.0, **action.model_dump(include=fields)) for action in actions)
