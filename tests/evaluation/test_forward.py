"""Cheaper ways through a forward give the same numbers and leave the model as it was."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import NewGELUActivation

from raysearch.evaluation.forward import fused_gelu, only_at


@torch.no_grad()
def test_a_module_runs_at_the_positions_that_are_asked_for() -> None:
    module, x = nn.LayerNorm(8), torch.randn(2, 5, 8)
    module.bias.data += 1  # so that zeros are not its output
    exact, positions, seen = module(x), torch.tensor([0, 3, 9]), []
    watch = module.register_forward_hook(lambda _, inputs, output: seen.append(tuple(inputs[0].shape)))
    with only_at(positions, module):
        found = module(x)
    watch.remove()
    assert seen == [(1, 3, 8)]
    assert torch.equal(found.view(-1, 8)[positions], exact.view(-1, 8)[positions])
    others = torch.ones(10, dtype=torch.bool)
    others[positions] = False
    assert not found.view(-1, 8)[others].any()
    assert torch.equal(module(x), exact)


def test_no_module_is_no_change() -> None:
    with only_at(torch.tensor([0]), None):
        pass


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4 * 2.0**-24), (torch.bfloat16, 2 * 2.0**-8)])
def test_the_fused_gelu_rounds_as_transformers_does(dtype: torch.dtype, tolerance: float) -> None:
    """Within a few unit round-offs of the exact value, relative to |x| which the tails are differences of."""
    x = torch.cat([torch.linspace(-12, 12, 20_001), torch.tensor([0.0, -0.0])]).to(dtype)
    model = nn.Sequential(NewGELUActivation())
    exact = NewGELUActivation()(x.double())
    with fused_gelu(model):
        assert not isinstance(model[0], NewGELUActivation)
        found = model(x)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= tolerance * x.double().abs()).all()


def test_the_models_own_activations_come_back(gpt2: Any) -> None:
    before = [id(module) for module in gpt2.modules()]
    with pytest.raises(RuntimeError, match="boom"), fused_gelu(gpt2):
        assert [id(module) for module in gpt2.modules()] != before
        raise RuntimeError("boom")
    assert [id(module) for module in gpt2.modules()] == before
