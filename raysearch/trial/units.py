"""Units over shards: what is summed over their weights, and masks of whole ones. Collective, and equal on every rank."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.pruning.budgets import evened, num_to_prune, units_to_keep
from raysearch.pruning.patterns import Units, units_of
from raysearch.training.engine import Engine, Shard

OfShard = Callable[[Shard], Tensor]
"""shard -> a number for each of its weights [n]."""


def unit_counts(engine: Engine, units: Units, is_eligible: OfShard) -> tuple[Tensor, Tensor]:
    """On the CPU: int64 [U], weights of each unit; bool [U], whether any of them is eligible."""
    table = torch.zeros(2, len(units.group) + 1, dtype=torch.int64, device=engine.device)  # the last column is of no unit
    for shard, where in _places(engine, units):
        table[0].scatter_add_(0, where, torch.ones_like(where))
        table[1].scatter_add_(0, where, is_eligible(shard).long())
    sizes, alive = engine.all_reduce(table)[:, :-1].cpu()
    return sizes, alive > 0


def unit_sums(engine: Engine, units: Units, sizes: Tensor, of_shard: OfShard) -> Tensor:
    """fp64 [U] on the CPU: sums over the weights of each unit, as integers, in which no order of adding shows."""
    parts = [(of_shard(shard), where) for shard, where in _places(engine, units)]
    largest = max((numbers.abs().max() for numbers, _ in parts), default=torch.zeros((), device=engine.device))
    # integers of as many bits as the sum over the largest unit leaves, at most 40
    num_bits = min(40, 62 - int(sizes.max()).bit_length())
    scale = 2.0**num_bits / max(engine.maximum(largest), torch.finfo(torch.float32).tiny)
    sums = torch.zeros(len(units.group) + 1, dtype=torch.int64, device=engine.device)
    for numbers, where in parts:
        sums.scatter_add_(0, where, (numbers.double() * scale).round().long())
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


def _places(engine: Engine, units: Units) -> list[tuple[Shard, Tensor]]:
    """Of each part that is scored: its shard, and int64 [n], the unit of each weight, U where it has none."""
    places = []
    for shard in engine.prunable_shards:
        for part in units.parts:
            if part.name == shard.name and not part.goes_along:
                unit = units_of(part, shard.start, shard.start + shard.values.numel(), engine.device)
                places.append((shard, torch.where(unit < 0, len(units.group), unit)))
    return places
