"""Weights, masks and an error bound that the kernel tests share."""

import torch
from torch import Tensor

EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Unit round-off."""

SHAPES = [(64, 128), (72, 200), (1, 8), (33, 72), (300, 96)]
"""Of weights [O, K]: even and ragged for every block side, one output."""


def mask_of(pattern: str, block: int, shape: tuple[int, int], sparsity: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    if pattern == "2:4":
        order = torch.rand(rows, -(-columns // 4), 4, generator=generator).argsort(dim=-1)
        return (order < 2).view(rows, -1)[:, :columns]
    kept = torch.rand(-(-rows // block), -(-columns // block), generator=generator) >= sparsity
    return kept.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns].contiguous()


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y = x weight^T + bias within what rounding in y's dtype and fp32 sums in any order can do (Higham 2002, 3.5):
    |error| <= u |y| + 4 sqrt(K) 2^-24 |x| |weight|^T, the square root for errors that do not conspire."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    bound = EPSILON[y.dtype] * 1.01 * exact.abs() + 4 * weight.shape[1] ** 0.5 * 2.0**-24 * size + 1e-30
    worst = ((y.double() - exact).abs() / bound).max()
    assert y.shape == exact.shape
    assert worst <= 1, f"error is {worst:.1f} times its bound"
