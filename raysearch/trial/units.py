"""Units over shards: what is summed over their weights, and masks of whole ones. Collective, and equal on every rank."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.pruning.budgets import evened, num_to_prune, units_to_keep
from raysearch.pruning.patterns import Stretch, Units, stretch, unit_sizes
from raysearch.training.engine import Engine, Shard

OfShard = Callable[[Shard], Tensor]
"""shard -> a number for each of its weights [n]."""


class UnitMap:
    """Where the units lie on this rank's shards: looked up once, since masks may change in many steps."""

    def __init__(self, engine: Engine, units: Units) -> None:
        self.engine, self.units, self.sizes = engine, units, unit_sizes(units)
        self._places = [(position, part, stretch(part, shard.start, num, len(units.group), engine.device))
                        for position, shard in enumerate(engine.shards) for part in units.parts
                        if part.name == shard.name and (num := shard.values.numel())]
        self._scored = [(engine.shards[position], here) for position, part, here in self._places
                        if part.name in engine.prunable_names and not part.goes_along]

    def eligible(self, is_eligible: OfShard) -> Tensor:
        """bool [U] on the CPU: whether any weight of a unit is eligible."""
        return self._sums((here, is_eligible(shard).long()) for shard, here in self._scored).cpu() > 0

    def sums(self, of_shard: OfShard) -> Tensor:
        """fp64 [U] on the CPU: sums over the weights of each unit, as integers, in which no order of adding shows."""
        numbers = [(here, of_shard(shard)) for shard, here in self._scored]
        largest = max((each.abs().max() for _, each in numbers), default=torch.zeros((), device=self.engine.device))
        # integers of as many bits as the sum over the largest unit leaves, at most 40
        num_bits = min(40, 62 - int(self.sizes.max()).bit_length())
        scale = 2.0**num_bits / max(self.engine.maximum(largest), torch.finfo(torch.float32).tiny)
        return self._sums((here, (each.double() * scale).round().long()) for here, each in numbers).cpu().double() / scale

    def _sums(self, numbers: Iterable[tuple[Stretch, Tensor]]) -> Tensor:
        sums = torch.zeros(len(self.sizes) + 1, dtype=torch.int64, device=self.engine.device)
        for here, each in numbers:
            here.add_to(sums, each)
        return self.engine.all_reduce(sums)[:-1]

    def masks(self, action: Action, sparsity: float | None, scores: Tensor, eligible: Tensor, before: Sequence[Tensor | None]
              ) -> list[Tensor | None]:
        """Of the engine's shards, within the masks `before`: units whose weights are all pruned for good stay so."""
        keep = self._kept(action, sparsity, scores, eligible)
        keep = torch.nn.functional.pad(keep, (0, 1), value=True).to(self.engine.device)  # and what belongs to no unit
        masks = list(before)
        for position, _, here in self._places:
            mask, stays = masks[position], here.spread(keep)
            masks[position] = stays if mask is None else mask & stays
        return masks

    def _kept(self, action: Action, sparsity: float | None, scores: Tensor, eligible: Tensor) -> Tensor:
        """bool [U] on the CPU."""
        keep, units = eligible.clone(), self.units
        if sparsity is None:
            assert action.threshold is not None
            keep &= scores >= action.threshold
        else:
            groups = units.group if action.scope == "layer" else torch.zeros_like(units.group)
            for group in groups.unique():
                members = (groups == group).nonzero().view(-1)
                num_prune = num_to_prune(sparsity, int(self.sizes[members].sum()))
                keep[members] = units_to_keep(scores[members], self.sizes[members], eligible[members], num_prune)
        if action.uniform:
            keep = evened(keep, scores, eligible, units.group)
        if not keep.any():
            keep[scores.argmax()] = True  # a model without any head is no model
        return keep
