"""SparseGPT: one matrix after the other, its lowest weights pruned and the others changed so that its outputs change least."""

from collections.abc import Callable

import torch
from torch import Tensor

WIDTH = 128
"""Inputs whose weights are compared with each other, and changed before the next ones are."""
DAMPING = 0.01
"""Of the mean diagonal, added to it."""


def products(inputs: Tensor) -> Tensor:
    """fp32 [K, K] of inputs [positions, K]; over all positions it is the Hessian of the squared error, up to a factor."""
    wide = inputs.float()
    return wide.T @ wide


def solve(weights: Tensor, hessian: Tensor, masks_of: Callable[[Tensor], Tensor], group: int) -> tuple[Tensor, Tensor]:
    """(weights fp32 [O, K], mask bool [O, K]) of the pruned matrix; Frantar & Alistarh 2023 (arXiv 2301.00774), algorithm 1.

    weights [O, K], where 0 is pruned already and stays so; hessian [K, K], a sum of `products`, of any scale. `masks_of` scores
    [O, up to WIDTH], or [O, up to `group`] where `group` is not 0, says which stay; larger scores are more important. Differs
    from the public code in that exactly as many go as `masks_of` says (there one more in each part), and that the weights of an
    input that was never other than 0 are ranked by their size (there they all go). Changes neither argument.
    """
    num_inputs = weights.shape[1]
    width = max(group, WIDTH // group * group) if group else WIDTH
    factor = _inverse_factor(hessian)
    weights, eligible = weights.clone(), weights != 0
    mask = torch.empty_like(eligible)
    for start in range(0, num_inputs, width):
        stop = min(start + width, num_inputs)
        part, here, errors = weights[:, start:stop], factor[start:stop, start:stop], torch.empty_like(weights[:, start:stop])
        for column in range(stop - start):
            if column % (group or width) == 0:
                ahead = slice(column, column + (group or width))
                may_stay, kept = eligible[:, start:stop][:, ahead], mask[:, start:stop][:, ahead]
                scores = (part[:, ahead] / here.diagonal()[ahead]).square()
                kept.copy_(masks_of(scores.masked_fill(~may_stay, -torch.inf)) & may_stay)
            value = torch.where(mask[:, start + column], part[:, column], 0)
            errors[:, column] = (part[:, column] - value) / here[column, column]
            part[:, column:] -= errors[:, column, None] * here[column, column:]
            part[:, column] = value
        weights[:, stop:] -= errors @ factor[start:stop, stop:]
    return weights, mask


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U the inverse of the damped Hessian."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0  # of an input that was always 0
    diagonal += DAMPING * diagonal.mean()
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    return factor
