"""One attention function for scoring and generating, in place of transformers' own while a Scorer works.

transformers builds a mask, a cache and their checks (which wait for the GPU) before every forward; here the mask is the
scorer's and the cache a few plain tensors, so a forward is nothing but kernels and can be captured as a CUDA graph.

Legend: B rows, H heads, S new tokens per row, D head size, L tokens that a slot of the cache can hold.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "raysearch"
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of torch's scaled dot products. Without cuDNN's, which builds a plan for every new shape."""

Extend = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, keys, values of the new tokens [B, H, S, D]) -> the keys and values that they attend to."""

_STEP: ContextVar[tuple[Tensor | None, Extend | None]] = ContextVar("step", default=(None, None))


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """The model's attention layers call `_attend`; the way they had before comes back at the end."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    with ExitStack() as stack:
        if next(model.parameters()).is_cuda:
            stack.enter_context(sdpa_kernel(KERNELS))
        try:
            for config in configs.values():
                config._attn_implementation = NAME
            yield
        finally:
            for key, config in configs.items():
                config._attn_implementation = before[key]


@contextmanager
def attending(mask: Tensor | None, extend: Extend | None = None) -> Iterator[None]:
    """Forwards inside use this additive mask [B or 1, 1, S, keys], None for causal, and these keys and values."""
    token = _STEP.set((mask, extend))
    try:
        yield
    finally:
        _STEP.reset(token)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, the most negative number elsewhere: what every scaled-dot-product kernel takes."""
    return torch.zeros((), dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def tree_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, S, S] of rows flattened depth-first (packing.py): q sees k when k <= q <= ends[k]."""
    q = torch.arange(ends.shape[1], device=ends.device)[:, None]
    return additive((q >= q.T) & (q <= ends[:, None, :]), dtype)[:, None]


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
            scaling: float | None = None, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, None]:
    mask, extend = _STEP.get()
    if extend is not None:
        key, value = extend(module.layer_idx, key, value)
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
