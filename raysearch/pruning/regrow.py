"""Sparse training at a fixed sparsity: now and then each layer drops its smallest weights and grows as many others."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raysearch.pruning.selection import SCORES, AllReduce, Passes, keep_masks, one_process, reserved


def moved_fraction(step: int, last: int, fraction: float) -> float:
    """Of a layer's kept weights, those that move after `step`: fraction / 2 (1 + cos(pi step / last)), Evci et al. 2020 (RigL,
    arXiv 1911.11134) section 3."""
    return fraction / 2 * (1 + math.cos(math.pi * min(step, last) / last))


class Moves(NamedTuple):
    """Of a layer, over all ranks."""

    num_weights: int
    num_kept: int
    num_moved: int
    """Of the kept."""


def drop_and_grow(weights: Sequence[Tensor], masks: Sequence[Tensor], growth: Sequence[Tensor], layers: Sequence[int],
                  moves: Mapping[int, Moves], *, all_reduce: AllReduce = one_process, rank: int = 0, world_size: int = 1,
                  passes: Passes = SCORES) -> list[Tensor]:
    """bool [n] each: the masks of this rank's shards once as many weights of each layer have moved as `moves` says.

    weights, growth fp32 [n], masks bool [n], one for each shard, of the layer that `layers` names. In each layer the lowest |w|
    among the kept go; of all that are then pruned the highest `growth` come, so that one which just went may stay after all, as
    in RigL's code. Ties go by flat index. Collective, as `keep_masks`, and `moves` has every layer on every rank.
    """
    def highest(scores: Iterable[Tensor], eligible: Sequence[Tensor], num: Callable[[Moves], int]) -> list[Tensor]:
        return keep_masks([reserved(score, may) for score, may in zip(scores, eligible, strict=True)], layers,
                          {layer: each.num_weights - num(each) for layer, each in moves.items()}, all_reduce=all_reduce,
                          rank=rank, world_size=world_size, passes=passes)

    stays = highest((each.abs() for each in weights), masks, lambda each: each.num_kept - each.num_moved)
    grown = highest(growth, [~each for each in stays], lambda each: each.num_moved)
    return [one | other for one, other in zip(stays, grown)]


def random_growth(num_weights: int, generator: torch.Generator) -> Tensor:
    """fp32 [num_weights] of a whole layer: SET grows anywhere, Mocanu et al. 2018 (arXiv 1707.04780)."""
    return torch.rand(num_weights, generator=generator, device=generator.device)
