"""SparseGPT against its definition: after each input, the others are the least-squares solution of what is left."""

import pytest
import torch
from torch import Tensor

from raysearch.pruning.selection import group_masks, row_masks
from raysearch.pruning.sparsegpt import DAMPING, products, solve


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half(scores: Tensor) -> Tensor:
    return row_masks(scores.reshape(1, -1), scores.numel() // 2).view(scores.shape)


def two_of_four(scores: Tensor) -> Tensor:
    return group_masks(scores, 2, 4)


def keep_all(scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


INPUTS = some(0, 400, 12) @ some(1, 12, 12)  # correlated


@pytest.mark.parametrize(("masks_of", "group"), [(keep_all, 0), (lambda scores: group_masks(scores, 4, 4), 4)])
def test_at_sparsity_0_it_returns_the_weights(masks_of, group: int) -> None:
    weights, hessian = some(2, 5, 12), products(INPUTS)
    found, mask = solve(weights, hessian, masks_of, group)
    assert torch.equal(found, weights)
    assert mask.all()


@pytest.mark.parametrize(("masks_of", "group"), [(half, 0), (two_of_four, 4)])
def test_it_is_optimal_brain_surgery_input_by_input(masks_of, group: int) -> None:
    """By hand, in fp64, with no factorisation: prune an input's weight, move the later ones by w / [H^-1]_jj times its row of
    the inverse (optimal brain surgery, eq. 3), and leave that input out of the Hessian."""
    weights, hessian = some(2, 5, 12), products(INPUTS[:200]) + products(INPUTS[200:])
    weights[3, :5] = 0  # pruned already
    found, mask = solve(weights, hessian, masks_of, group)
    wide = hessian.double() + DAMPING * hessian.diagonal().double().mean() * torch.eye(12, dtype=torch.float64)
    hand, eligible = weights.double(), weights != 0
    diagonals, inverses = [], []
    for column in range(12):
        inverses.append(torch.linalg.inv(wide[column:, column:]))
        diagonals.append(float(inverses[-1][0, 0]) ** 0.5)
    stays = torch.zeros(5, 12, dtype=torch.bool)
    for column in range(12):
        if column % (group or 12) == 0:
            ahead = slice(column, column + (group or 12))
            scores = (hand[:, ahead] / torch.tensor(diagonals[ahead])) ** 2
            stays[:, ahead] = masks_of(scores.float().masked_fill(~eligible[:, ahead], -torch.inf)) & eligible[:, ahead]
        for row in range(5):
            if not stays[row, column]:
                error = float(hand[row, column]) / float(inverses[column][0, 0])
                hand[row, column:] -= error * inverses[column][0]
                hand[row, column] = 0.0
    assert torch.equal(mask, stays)
    assert torch.allclose(found.double(), hand, atol=1e-4)
    assert not found[~mask].any()
    assert not (mask & ~eligible).any()


def test_outputs_change_less_than_by_magnitude_and_parts_are_pruned_alike() -> None:
    inputs = some(0, 2000, 300) @ some(1, 300, 300)
    weights = some(2, 8, 300)
    before = weights.clone()
    found, mask = solve(weights, products(inputs), half, 0)
    assert torch.equal(weights, before)
    assert [int((~part).sum()) for part in mask.split(128, dim=1)] == [8 * 64, 8 * 64, 8 * 22]

    def error(pruned: Tensor) -> float:
        return float(((pruned - weights) @ inputs.T).square().sum())

    assert error(found) < 0.8 * error(weights * half(weights.abs()))
    _, ragged = solve(weights, products(inputs), lambda scores: group_masks(scores, 3, 7), 7)
    assert (torch.nn.functional.pad(ragged.int(), (0, -300 % 7)).reshape(-1, 7).sum(1) <= 3).all()


def test_inputs_that_are_always_0_do_no_harm() -> None:
    inputs = INPUTS.clone()
    inputs[:, 4] = 0
    found, _ = solve(some(2, 5, 12), products(inputs), half, 0)
    assert found.isfinite().all()
