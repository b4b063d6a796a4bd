"""AdamW that keeps masks: kept weights are torch's, pruned ones exactly zero, and L1 makes exact zeros."""

import pytest
import torch
from torch import Tensor

from raysearch.training.optimizer import SparseAdamW


def masters(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, generator=generator, requires_grad=True) for _ in range(2)]


def steps(optimizer: torch.optim.Optimizer, parameters: list[Tensor], num_steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        for parameter in parameters:
            parameter.grad = torch.randn(40, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])  # of a GPU and of a CPU
def test_kept_weights_are_those_of_adamw_and_pruned_ones_zero(mask_dtype: torch.dtype) -> None:
    options = {"lr": 0.1, "weight_decay": 0.1}
    ours, theirs = masters(), masters()
    keep = torch.arange(40) % 3 != 0
    optimizer = SparseAdamW([{"params": ours}], **options)
    optimizer.masks[ours[0]] = keep.to(mask_dtype)
    with torch.no_grad():
        ours[0].mul_(keep)
        theirs[0].mul_(keep)
    steps(optimizer, ours, 5)
    steps(torch.optim.AdamW(theirs, **options), theirs, 5)
    assert torch.equal(ours[0][keep], theirs[0][keep])
    assert not ours[0][~keep].any()
    assert theirs[0][~keep].all()  # without masks they would have come back
    assert torch.equal(ours[1], theirs[1])  # no mask: as ever


def test_the_l1_step_by_hand() -> None:
    master = torch.tensor([0.5, -0.5, 0.05, -0.05, 0.3], requires_grad=True)
    optimizer = SparseAdamW([{"params": [master]}], lr=0.1, weight_decay=0.0)
    optimizer.masks[master] = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    optimizer.l1_lambda = 2.0
    optimizer.keep_masks(0.1)  # |w| - 0.1 * 2
    assert torch.allclose(master, torch.tensor([0.3, -0.3, 0.0, 0.0, 0.0]))
    assert (master == 0).tolist() == [False, False, True, True, True]


def test_a_restarted_optimizer_is_a_fresh_one() -> None:
    used, fresh = masters(), masters()
    optimizer = SparseAdamW([{"params": used}], lr=0.1)
    steps(optimizer, used, 7)
    with torch.no_grad():
        for mine, other in zip(used, masters()):
            mine.copy_(other)
    optimizer.restart()
    steps(optimizer, used, 3)
    steps(SparseAdamW([{"params": fresh}], lr=0.1), fresh, 3)
    assert all(torch.equal(a, b) for a, b in zip(used, fresh))
