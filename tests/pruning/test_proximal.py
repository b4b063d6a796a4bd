"""Soft thresholding: exact zeros, in place, nothing else touched."""

import math

import pytest
import torch

from raysearch.pruning.proximal import group_factors, soft_threshold_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula_in_place(dtype: torch.dtype) -> None:
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = weight.sign() * (weight.abs() - 0.5).clamp(min=0)
    result = soft_threshold_(weight, 0.5)
    assert result is weight
    assert torch.equal(weight, expected)
    assert 0.3 < (weight == 0).float().mean() < 0.45  # P(|N(0, 1)| <= 0.5) = 0.383


def test_ties_with_the_amount_become_zero_and_zero_amount_changes_nothing() -> None:
    weight = torch.tensor([-0.25, 0.25, 0.0, -1.0])
    assert soft_threshold_(weight, 0.25).tolist() == [0.0, 0.0, 0.0, -0.75]
    denormal = torch.tensor([1e-45, -0.0])
    bits = denormal.view(torch.int32).tolist()
    assert soft_threshold_(denormal, 0.0).view(torch.int32).tolist() == bits


def test_works_on_a_parameter_that_requires_grad() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    assert soft_threshold_(weight, 0.5).tolist() == [0.5, 0.5, 0.5]
    assert weight.grad_fn is None


@pytest.mark.parametrize("amount", [-1.0, float("nan"), float("inf")])
def test_refuses(amount: float) -> None:
    with pytest.raises(ValueError, match="must be finite and at least 0"):
        soft_threshold_(torch.ones(2), amount)


def test_a_group_is_shrunk_as_one() -> None:
    """The definition in a loop: what minimises amount sqrt(n) ||v|| + ||v - w||^2 / 2."""
    groups = [torch.tensor([3.0, 4.0]), torch.tensor([0.01, -0.02, 0.01]), torch.zeros(4), torch.tensor([-1.0])]
    squares = torch.tensor([float(g.square().mean()) for g in groups])
    factors = group_factors(squares, 0.5)
    for group, factor in zip(groups, factors.tolist()):
        amount, norm = 0.5 * math.sqrt(len(group)), float(group.norm())
        assert factor == pytest.approx(max(0.0, 1 - amount / norm) if norm else 0.0, rel=1e-6)

        def cost(v: torch.Tensor, group: torch.Tensor = group, amount: float = amount) -> float:
            return amount * float(v.norm()) + float((v - group).square().sum()) / 2

        best = cost(factor * group)
        assert all(best <= cost((factor + step) * group) + 1e-9 for step in (-0.01, 0.01) if factor + step >= 0)
    assert factors[1] == 0
    assert group_factors(squares, 0.0).tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="the amount of group shrinkage must be finite and at least 0, got -1"):
        group_factors(squares, -1)
