"""The proximal step of an L1 penalty."""

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
