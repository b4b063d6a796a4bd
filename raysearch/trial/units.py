"""Units over shards: what is summed over their weights, and masks of whole ones. Collective, and equal on every rank."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.pruning.budgets import evened, num_to_prune, units_to_keep
from raysearch.pruning.patterns import Part, Units, units_of
from raysearch.training.engine import Engine, Shard

OfShard = Callable[[Shard], Tensor]
"""shard -> a number for each of its weights [n]."""


def eligible_units(engine: Engine, units: Units, is_eligible: OfShard) -> Tensor:
    """bool [U] on the CPU: whether any weight of a unit is eligible."""
    counts = torch.zeros(len(units.group) + 1, dtype=torch.int64, device=engine.device)  # the last is of no unit
    for shard, part in _places(engine, units):
        _add_by_unit(counts, part, shard.start, is_eligible(shard).long())
    return engine.all_reduce(counts)[:-1].cpu() > 0


def unit_sums(engine: Engine, units: Units, sizes: Tensor, of_shard: OfShard) -> Tensor:
    """fp64 [U] on the CPU: sums over the weights of each unit, as integers, in which no order of adding shows."""
    places = [(part, shard.start, of_shard(shard)) for shard, part in _places(engine, units)]
    largest = max((numbers.abs().max() for *_, numbers in places), default=torch.zeros((), device=engine.device))
    # integers of as many bits as the sum over the largest unit leaves, at most 40
    num_bits = min(40, 62 - int(sizes.max()).bit_length())
    scale = 2.0**num_bits / max(engine.maximum(largest), torch.finfo(torch.float32).tiny)
    sums = torch.zeros(len(units.group) + 1, dtype=torch.int64, device=engine.device)
    for part, start, numbers in places:
        _add_by_unit(sums, part, start, (numbers.double() * scale).round().long())
    return engine.all_reduce(sums)[:-1].cpu().double() / scale


def unit_masks(engine: Engine, units: Units, action: Action, sparsity: float | None, scores: Tensor, sizes: Tensor,
               eligible: Tensor, before: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Of the engine's shards, within the masks `before`: units whose weights are all pruned for good stay so."""
    keep = eligible.clone()
    if sparsity is None:
        assert action.threshold is not None
        keep &= scores >= action.threshold
    else:
        groups = units.group if action.scope == "layer" else torch.zeros_like(units.group)
        for group in groups.unique():
            members = (groups == group).nonzero().view(-1)
            num_prune = num_to_prune(sparsity, int(sizes[members].sum()))
            keep[members] = units_to_keep(scores[members], sizes[members], eligible[members], num_prune)
    if action.uniform:
        keep = evened(keep, scores, eligible, units.group)
    if not keep.any():
        keep[scores.argmax()] = True  # a model without any head is no model
    masks = list(before)
    for index, shard in enumerate(engine.shards):
        for part in units.parts:
            if part.name == shard.name:
                unit = units_of(part, shard.start, shard.start + shard.values.numel(), engine.device)
                stays = keep.to(unit.device)[unit.clamp(min=0)] | (unit < 0)
                mask = masks[index]
                masks[index] = stays if mask is None else mask & stays
    return masks


def _places(engine: Engine, units: Units) -> list[tuple[Shard, Part]]:
    """Each part that is scored, with its shard."""
    return [(shard, part) for shard in engine.prunable_shards for part in units.parts
            if part.name == shard.name and not part.goes_along and shard.values.numel()]


def _add_by_unit(sums: Tensor, part: Part, start: int, numbers: Tensor) -> None:
    """Adds int64 [n] of the weights from `start` on of the flattened parameter to the sums [U + 1] of their units: over equal
    rows and over equal columns first, since a GPU adds to one place one after the other."""
    width = len(part.columns)
    row, column = divmod(start, width)
    height = -(-(column + len(numbers)) // width)
    table = torch.nn.functional.pad(numbers, (column, height * width - column - len(numbers))).view(height, width)
    table, rows = _folded(table, 0, part.rows[row:row + height])
    table, columns = _folded(table, 1, part.columns)
    unit = (rows[:, None] + columns).flatten()
    sums.index_add_(0, torch.where(unit < 0, len(sums) - 1, unit).to(sums.device), table.flatten())


def _folded(table: Tensor, dim: int, lines: Tensor) -> tuple[Tensor, Tensor]:
    """(the table with its lines of equal numbers summed, the numbers)."""
    distinct, where = lines.unique(return_inverse=True)
    if len(distinct) == 1:
        return table.sum(dim, keepdim=True), distinct
    shape = (len(distinct), table.shape[1]) if dim == 0 else (table.shape[0], len(distinct))
    return table.new_zeros(shape).index_add_(dim, where.to(table.device), table), distinct
