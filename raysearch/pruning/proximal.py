"""The proximal steps of an L1 penalty and of group lasso."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def soft_threshold_(weight: Tensor, amount: float) -> Tensor:
    """w <- sign(w) * max(|w| - amount, 0) in place, in one pass; `amount` is learning rate * l1_lambda.

    The proximal operator of amount * |w|, Parikh & Boyd 2014 eq. 6.9. What it prunes is exactly zero, which a
    subgradient inside Adam never reaches. Give it the fp32 master weights: bf16 would round small amounts away.
    """
    if not 0 <= amount < math.inf:
        raise ValueError(f"the amount of L1 shrinkage must be finite and at least 0, got {amount:g}")
    if amount > 0:
        torch.ops.aten.softshrink.out(weight, amount, out=weight)
    return weight


def group_factors(mean_squares: Tensor, amount: float) -> Tensor:
    """fp32 [G]: what each group's weights are multiplied by, max(0, 1 - amount sqrt(n) / ||w||), so that a whole group becomes
    exactly 0: the proximal operator of amount * sum of sqrt(n) ||w||, Yuan & Lin 2006 eq. 2.3 and Parikh & Boyd 2014 eq. 6.15.

    mean_squares [G]: ||w||^2 / n. A group goes when the root of its mean square is at most `amount`, which has the same unit as
    that of `soft_threshold_`.
    """
    if not 0 <= amount < math.inf:
        raise ValueError(f"the amount of group shrinkage must be finite and at least 0, got {amount:g}")
    rms = mean_squares.double().sqrt()
    return (1 - amount / rms.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0).float()
