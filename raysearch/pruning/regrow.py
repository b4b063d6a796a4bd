"""Sparse training at a fixed sparsity: now and then each layer drops its smallest weights and grows as many others."""

import math

import torch
from torch import Tensor

from raysearch.pruning.selection import SCORES, AllReduce, keep_masks, one_process, reserved


def moved_fraction(step: int, last: int, fraction: float) -> float:
    """Of a layer's kept weights, those that move after `step`: fraction / 2 (1 + cos(pi step / last)), Evci et al. 2020 (RigL,
    arXiv 1911.11134) section 3."""
    return fraction / 2 * (1 + math.cos(math.pi * min(step, last) / last))


def drop_and_grow(weights: Tensor, mask: Tensor, growth: Tensor, num_weights: int, num_kept: int, num_moved: int, *,
                  all_reduce: AllReduce = one_process, rank: int = 0, world_size: int = 1) -> Tensor:
    """bool [n]: the mask of a layer's shard once `num_moved` of the layer's `num_kept` weights have moved, out of all.

    weights, growth fp32 [n], mask bool [n]. The lowest |w| among the kept go; of all that are then pruned the highest `growth`
    come, so that one which just went may stay after all, as in RigL's code. Ties go by flat index. Collective, as `keep_masks`.
    """
    def highest(scores: Tensor, eligible: Tensor, num: int) -> Tensor:
        (found,) = keep_masks([reserved(scores, eligible)], [0], num_weights - num, all_reduce=all_reduce, rank=rank,
                              world_size=world_size, passes=SCORES)
        return found

    stays = highest(weights.abs(), mask, num_kept - num_moved)
    return stays | highest(growth, ~stays, num_moved)


def random_growth(num_weights: int, generator: torch.Generator) -> Tensor:
    """fp32 [num_weights] of a whole layer: SET grows anywhere, Mocanu et al. 2018 (arXiv 1707.04780)."""
    return torch.rand(num_weights, generator=generator, device=generator.device)
