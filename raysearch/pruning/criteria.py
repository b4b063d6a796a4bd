"""Scores: the numbers by which weights are ranked, lowest pruned first; and the magnitude cut-off of Han et al."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK_WEIGHTS = 1 << 20  # 8 MB of fp64 at a time


def magnitude_scores(weight: Tensor) -> Tensor:
    """|w|, in the shape and dtype of `weight`.

    `selection` ignores the sign of a score, so it takes the weights themselves and this copy is not needed there.
    """
    return weight.abs()


def moments(shards: Sequence[Tensor]) -> Tensor:
    """(sum, sum of squares, count) of one layer's 1-D shards, [3] fp64; add up over ranks for `std_threshold`."""
    device = shards[0].device if shards else torch.device("cpu")
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for shard in shards:
        for start in range(0, shard.numel(), _CHUNK_WEIGHTS):
            wide = shard.detach()[start : start + _CHUNK_WEIGHTS].double()
            total[0] += wide.sum()
            total[1] += wide.dot(wide)
            total[2] += wide.numel()
    return total


def std_threshold(num_std: float, total: float, total_of_squares: float, num_weights: float) -> float:
    """tau = q * std(W), Han et al. 2015 (arXiv 1506.02626, section 3; q = `num_std`), from the layer's moments in fp64.

    std is the population's, as in Han's code (numpy). Raises ValueError for a q below 0, for a layer without weights
    and for weights that are not finite.
    """
    if not 0 <= num_std < math.inf:
        raise ValueError(f"threshold in units of std must be finite and at least 0, got {num_std:g}")
    if num_weights < 1:
        raise ValueError(f"the std of a layer needs at least one weight, got {num_weights:g}")
    if not math.isfinite(total_of_squares):
        raise ValueError(f"the std of a layer needs finite weights, got a sum of squares of {total_of_squares:g}")
    mean = total / num_weights
    return num_std * math.sqrt(max(total_of_squares / num_weights - mean * mean, 0.0))
