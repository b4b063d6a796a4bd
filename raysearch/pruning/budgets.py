"""Budgets: how many weights, or units, each comparison group gives up."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

HOLD, SETTLE = 0.1, 0.7
"""Shares of a round's steps: no mask changes before the first, none after the second (Sanh et al. hold and settle too)."""


def num_to_prune(sparsity: float, num_weights: int) -> int:
    """sparsity * num_weights, halves rounded up, in exact decimal arithmetic (0.29 of 50 is 14.5, hence 15)."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be between 0 and 1, got {sparsity:g}")
    return math.floor(Fraction(repr(float(sparsity))) * num_weights + Fraction(1, 2))


def erdos_renyi(shapes: Sequence[tuple[int, int]], sizes: Sequence[int], sparsity: float) -> list[float]:
    """The sparsity of each layer, of which those of large matrices are higher: density_l = eps (O + K) / (O K), Mocanu et al.
    2018 (arXiv 1707.04780) eq. 3, with eps such that sparsity * sum(sizes) weights go in all.

    shapes (O outputs, K inputs) of a layer's matrices; sizes, the weights of a layer (O K times the number of its matrices). A
    layer whose density would be above 1 stays dense, and the others share what is left, as in RigL (Evci et al. 2020).
    """
    dense: set[int] = set()
    left = (1 - sparsity) * sum(sizes)
    raw = [(outputs + inputs) / (outputs * inputs) for outputs, inputs in shapes]
    while len(dense) < len(sizes):
        eps = left / sum(size * each for index, (size, each) in enumerate(zip(sizes, raw)) if index not in dense)
        above = {index for index, each in enumerate(raw) if index not in dense and eps * each > 1}
        if not above:
            break
        dense |= above
        left -= sum(sizes[index] for index in above)
    return [0.0 if index in dense else 1 - eps * each for index, each in enumerate(raw)]


def owl(outliers: Sequence[float], sizes: Sequence[int], sparsity: float, reach: float) -> list[float]:
    """The sparsity of each layer, of which those with more outliers give up less: density_l = c + 2 lambda (D_l - min D) /
    (max D - min D), Yin et al. 2024 (arXiv 2310.05175) section 3.2, lambda = `reach`, with c such that sparsity * sum(sizes)
    weights go in all. Differs from their code where a density would be below 0 or above 1: it is that, and the others share
    what is left.

    outliers, the D_l: shares of a layer's scores that are above a multiple of their mean; sizes, its weights.
    """
    low, spread = min(outliers), max(outliers) - min(outliers)
    raised = [2 * reach * (each - low) / spread if spread else 0.0 for each in outliers]

    def densities(shift: float) -> list[float]:
        return [min(1.0, max(0.0, shift + each)) for each in raised]

    below, above = -max(raised), 1.0
    for _ in range(60):  # halves: what is kept rises with the shift
        middle = (below + above) / 2
        kept = sum(size * each for size, each in zip(sizes, densities(middle)))
        below, above = (middle, above) if kept < (1 - sparsity) * sum(sizes) else (below, middle)
    return [round(1 - each, 12) for each in densities(above)]


def units_to_keep(scores: Tensor, sizes: Tensor, eligible: Tensor, num_prune: int) -> Tensor:
    """bool [U]: which units of one comparison group stay when about `num_prune` of its weights go, lowest scores first.

    scores [U] any real numbers; sizes int64 [U], weights of each; eligible bool [U]: the others are gone already and count
    among what goes. A unit goes when at least half of it lies within the budget, so that units of one size are rounded as
    `num_to_prune` rounds weights. Ties go by index. ValueError for NaN.
    """
    if scores.isnan().any():
        raise ValueError("scores must be numbers, got NaN")
    order = torch.where(eligible, scores, -math.inf).argsort(stable=True)  # [U]
    before = sizes[order].cumsum(0) - sizes[order]
    gone = 2 * before + sizes[order] <= 2 * num_prune
    keep = eligible.clone()
    keep[order[gone]] = False
    return keep


def evened(keep: Tensor, scores: Tensor, eligible: Tensor, group: Tensor) -> Tensor:
    """bool [U]: as many units in every group as the one that keeps fewest has, but at least one that is eligible: the highest
    scores stay. keep, eligible bool [U]; scores [U]; group int64 [U] from 0 on. Ties go by index, as in `units_to_keep`."""
    num = max(1, int(torch.bincount(group, weights=keep.double()).min()))
    even = torch.zeros_like(keep)
    for each in range(int(group.max()) + 1):
        members = (group == each).nonzero().view(-1)
        order = torch.where(eligible, scores, -math.inf)[members].argsort(stable=True)
        even[members[order[-num:]]] = True
    return even & eligible


def sparsity_at(step: int, num_steps: int, start: float, target: float) -> float:
    """The sparsity after `step` of `num_steps` steps of a round that prunes while it trains.

    target + (start - target) (1 - p)^3, Zhu & Gupta 2017 (arXiv 1710.01878) eq. 1, with p from 0 at HOLD of the steps to 1 at
    SETTLE of them: scores are gathered before the first weight goes, and the last masks are trained with.
    """
    first, last = pruning_steps(num_steps)
    if step >= last:
        return target
    p = max(0.0, (step - first) / (last - first))
    return target + (start - target) * (1 - p) ** 3


def pruning_steps(num_steps: int) -> tuple[int, int]:
    """(first, last) step, counted from 1, after which masks may change."""
    last = max(1, round(SETTLE * num_steps))
    return min(max(1, round(HOLD * num_steps)), last), last


def masks_are_due(step: int, num_steps: int, interval: int) -> bool:
    """Whether masks change after this step, counted from 1: every `interval` steps from the first on, and at the last."""
    first, last = pruning_steps(num_steps)
    return first <= step <= last and ((step - first) % interval == 0 or step == last)
