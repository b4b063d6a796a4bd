"""Criteria: how weights are ranked. A criterion turns weights into scores, larger is kept; they may be negative.

Adding one is a function and a line in CRITERIA; tests/pruning/test_criteria.py runs every line through one suite.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raysearch.pruning.sparsegpt import products, solve

_CHUNK_WEIGHTS = 1 << 20  # 8 MB of fp64 at a time


class Criterion(NamedTuple):
    """All tensors are [n] fp32, any part of a parameter: a score depends on its own weight only. But with a `statistic`
    they are whole matrices [O outputs, K inputs]."""

    scores: Callable[[Tensor, Tensor | None], Tensor] | None
    """(weights, what was gathered, or the statistic) -> scores. None where `solve` has its own, and where layers are ranked."""
    gather: Callable[[Tensor, Tensor, Tensor], object] | None = None
    """(gathered, weights, gradients): adds to the first in place, in every step of the round, from gradients as they are
    before clipping. What it gathered ends with the round, and weights that it pruned in the round may come back."""
    is_gradual: bool = False
    """Prunes *during* its round, along the path from the parent's sparsity to the action's."""
    moves: bool = False
    """Prunes as its round begins; then each layer drops weights and grows others (pruning.regrow), the highest of what was
    gathered in the step before, or any where nothing is gathered. What the parent had pruned may come back."""
    trains_pruned: bool = False
    """What it pruned in the round is trained on, by the gradients of the masked weights, and may come back as it is by then."""
    is_soft: bool = False
    """Keeps what is above a threshold, whose path it follows *during* its round; its scores are trained."""
    by_sequence: bool = False
    """Gathers as its round begins, from one sequence of calibration text after the other; what counts is the size of a
    sequence's sum, over a unit where there are units."""
    statistic: Callable[[Tensor], Tensor] | None = None
    """inputs [positions, K] of a linear layer -> what is summed over calibration text, block after block of the model."""
    has_gates: bool = False
    """Learns a gate for each unit *during* its round; those whose gates open least go, along the path."""
    order: Callable[[int], Tensor] | None = None
    """L -> scores [L] of the layers of a model, by their place alone."""
    by_contribution: bool = False
    """Of layers: by how much a block changes what it gets, on calibration text."""
    by_activation: bool = False
    """Of heads and neurons: by how much they give, on calibration text."""
    solve: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor], int], tuple[Tensor, Tensor]] | None = None
    """(weights, statistic, scores -> mask of a part of the inputs, M of an N:M or 0) -> (changed weights, mask): it prunes a
    matrix by itself."""

    @property
    def bytes_beside(self) -> int:
        """Of each weight, while a round trains: what is gathered, what lies behind the masks, trained scores with their
        gradients and moments."""
        gathers = self.gather is not None and not self.by_sequence
        behind = (gathers and not self.moves) or self.trains_pruned or self.has_gates
        return 4 * gathers + 4 * behind + 16 * self.is_soft


def magnitude(weights: Tensor, gathered: Tensor | None) -> Tensor:
    """|w|. Single weights never come here: `selection` reads their magnitude off the bits, without a copy."""
    return weights.abs()


def square(weights: Tensor, gathered: Tensor | None) -> Tensor:
    """w^2, whose mean over a unit ranks units of one size by their L2 norm."""
    return weights.square()


def movement(weights: Tensor, gathered: Tensor | None) -> Tensor:
    """S = - sum over the steps of dL/dW * W, Sanh et al. 2020 (arXiv 2005.07683), eq. 3: weights that move away from 0 stay.

    dL/dW is the gradient of the masked weight, passed straight through the mask. Differs from their code in that the scores
    are summed as in the paper, where the code gives them to Adam; a factor on them changes no order.
    """
    assert gathered is not None
    return gathered


def gather_movement(gathered: Tensor, weights: Tensor, gradients: Tensor) -> None:
    gathered.addcmul_(weights, gradients, value=-1)


def gather_gradient(gathered: Tensor, weights: Tensor, gradients: Tensor) -> None:
    """|dL/dW|, of pruned weights too."""
    gathered.add_(gradients.abs())


def squares(inputs: Tensor) -> Tensor:
    """fp64 [K], whose sum over all positions is the square of each input's norm."""
    return inputs.double().square().sum(0)


def wanda(weights: Tensor, statistic: Tensor | None) -> Tensor:
    """|W_ij| ||X_j||_2, Sun et al. 2023 (arXiv 2306.11695) eq. 1; compared within an output there."""
    assert statistic is not None
    return weights.abs() * statistic.sqrt().float()


def ria(weights: Tensor, statistic: Tensor | None) -> Tensor:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||_2^a, a = 1/2: relative importance and activations, Zhang et al.
    2024 ("Plug-and-Play", ICLR)."""
    assert statistic is not None
    size, tiny = weights.abs(), torch.finfo(torch.float32).tiny  # of an input or output that is pruned as a whole
    relative = size / size.sum(0).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
    return relative * statistic.sqrt().sqrt().float()


def top(num_layers: int) -> Tensor:
    """The last layers go first. This and the four others: Sajjad et al. 2020 (arXiv 2004.03844), section 3."""
    return -torch.arange(num_layers, dtype=torch.float64)


def bottom(num_layers: int) -> Tensor:
    """The first layers go first."""
    return torch.arange(num_layers, dtype=torch.float64)


def alternate(num_layers: int) -> Tensor:
    """Every other layer goes first, beginning with the last one; then the others, likewise."""
    from_last = torch.arange(num_layers, dtype=torch.float64).flip(0)
    return from_last + num_layers * (from_last % 2)


def symmetric(num_layers: int) -> Tensor:
    """The middle goes first; of two the lower one."""
    return (torch.arange(num_layers, dtype=torch.float64) - (num_layers - 1) / 2).abs()


CRITERIA = {
    "magnitude": Criterion(magnitude),
    "l2": Criterion(square),  # of units: He et al. 2018 (arXiv 1808.06866)
    "gradual_magnitude": Criterion(magnitude, is_gradual=True),  # Zhu & Gupta 2017 (arXiv 1710.01878)
    "sr_ste": Criterion(magnitude, is_gradual=True, trains_pruned=True),  # Zhou et al. 2021 (arXiv 2102.04010)
    "movement": Criterion(movement, gather_movement, is_gradual=True),
    "soft_movement": Criterion(movement, gather_movement, is_soft=True),
    "l0": Criterion(None, has_gates=True),  # Voita et al. 2019 (arXiv 1905.09418), Louizos et al. 2018 (arXiv 1712.01312)
    "taylor": Criterion(movement, gather_movement, by_sequence=True),  # Molchanov et al. 2016 (arXiv 1611.06440)
    "top": Criterion(None, order=top),
    "bottom": Criterion(None, order=bottom),
    "alternate": Criterion(None, order=alternate),
    "symmetric": Criterion(None, order=symmetric),
    "contribution": Criterion(None, by_contribution=True),
    "activation": Criterion(None, by_activation=True),
    "rigl": Criterion(magnitude, gather_gradient, moves=True),  # Evci et al. 2020 (arXiv 1911.11134)
    "set": Criterion(magnitude, moves=True),  # Mocanu et al. 2018 (arXiv 1707.04780)
    "wanda": Criterion(wanda, statistic=squares),
    "ria": Criterion(ria, statistic=squares),
    "sparsegpt": Criterion(None, statistic=products, solve=solve),
}


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
