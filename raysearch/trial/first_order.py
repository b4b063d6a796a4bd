"""First order: what the loss on a sequence would change by if a weight, or a unit, went; one sequence after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.pruning.criteria import CRITERIA
from raysearch.pruning.patterns import Units, over_layer_norms
from raysearch.training.data import Blocks
from raysearch.training.engine import Engine
from raysearch.trial.unit_lines import SCALE, unit_lines


def first_order(engine: Engine, action: Action, text: Blocks | None, units: Units | None) -> Tensor | None:
    """Scores by the action's sequences, Molchanov et al. 2016 (arXiv 1611.06440) eq. 6: of `units` fp64 [U]; without them those
    of each weight are the optimizer's `gathered`. No weight changes. Collective, and equal on every rank."""
    assert text is not None, "the action was checked"
    if units is not None:
        return _of_units(engine, action, text, units)
    totals: dict[Tensor, Tensor] = {}
    for gathered in _sequences(engine, action, text):
        totals = {master: each.abs_() + totals.get(master, 0) for master, each in gathered.items()}
    engine.optimizer.gathered = totals
    return None


def _sequences(engine: Engine, action: Action, text: Blocks) -> Iterator[dict[Tensor, Tensor]]:
    """What was gathered from each. Every rank reads every sequence, so that the mean of their gradients is that of one sequence
    alone, whatever the world size."""
    gather = CRITERIA[action.criterion].gather
    assert gather is not None
    for tokens in text.stream(0, action.calibration_sequences, action.seed):
        engine.look(tokens[None], gather)
        yield engine.optimizer.gathered


def _of_units(engine: Engine, action: Action, text: Blocks, units: Units) -> Tensor:
    """|dL / d gate|, where a gate of 1 scales what each unit gives to the matrix that reads it: the sum of w dL/dw over the
    columns that do; divided by the norm of its layer's scores, as in their section 2.2. Of heads those are the scores of
    Michel et al. 2019 (arXiv 1905.10650) eq. 2. A layer is read by no matrix: its gate scales all of its own weights."""
    are_read = any(part.reads for part in units.parts)
    lines = unit_lines(engine, units, lambda part: part.reads or not (are_read or part.goes_along))
    scores = torch.zeros(len(units.group), dtype=torch.float64)
    for gathered in _sequences(engine, action, text):
        sums = torch.zeros(len(units.group) + 1, dtype=torch.int64, device=engine.device)
        for each in (each for of_master in lines.values() for each in of_master):
            each.add_to(sums, each.shard.part(gathered[each.shard.master]))
        scores += engine.all_reduce(sums)[:-1].cpu().double().abs() / SCALE
    return over_layer_norms(scores, units)
