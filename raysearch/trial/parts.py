"""Whether the model has what methods prune by, drop or calibrate: asked of its configuration, before anything is loaded."""

from collections.abc import Sequence

import torch

from raysearch.config import Action, Study, TrialConfig
from raysearch.models.architectures import layout
from raysearch.models.model import from_config, load_config, prunable_parameters
from raysearch.pruning.criteria import CRITERIA
from raysearch.pruning.patterns import PATTERNS, layer_outputs
from raysearch.training.calibration import linears_of_blocks
from raysearch.trial.actions import check_names


def check_parts(methods: Sequence[TrialConfig | Action], study: Study) -> None:
    """ValueError of one sentence, as the first round would raise it, where a method needs heads, neurons, layers or blocks that
    the table of architectures does not know of the study's model. No weight is read."""
    for each in methods:
        check_names(each)
    model = from_config(load_config(study.model.path), torch.float32)
    prunables = prunable_parameters(model, study.model.prunable)
    described = layout(model, prunables)
    try:
        for pattern in sorted({each.pattern for each in methods} - {"block", "block64"}):  # which every matrix has
            if (find_units := PATTERNS.get(pattern)) is not None:
                find_units(described)
        if any(each.layer_drop for each in methods):
            layer_outputs(described)
        if any(CRITERIA[each.criterion].statistic is not None or each.budget == "owl" for each in methods):
            linears_of_blocks(model, [each.name for each in prunables])
    except ValueError as error:
        raise ValueError(f"model {study.model.path}: {error}") from error
