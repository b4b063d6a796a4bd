"""A product with a sparse weight that is exact, and runs anywhere."""

import torch
from torch import Tensor, nn

from raysearch.kernels.weight import SparseWeight


def linear(x: Tensor, weight: SparseWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times W[O, K]^T plus bias, by dense products of 1,024 outputs at a time: exact, anywhere, and without
    the whole dense matrix. What `sparsify_for_inference` puts into a model is faster. ValueError for other inputs."""
    if x.shape[-1] != weight.shape[1] or x.dtype != weight.values.dtype or x.device != weight.values.device:
        raise ValueError(f"x must be [..., {weight.shape[1]}] in {weight.values.dtype} on {weight.values.device} for this "
                         f"weight, got {tuple(x.shape)} in {x.dtype} on {x.device}")
    parts = []
    for start, stop, value in weight.slabs:
        slab = weight.slab(start, stop, value)
        first = start * weight.block
        parts.append(nn.functional.linear(x, slab, None if bias is None else bias[first:first + len(slab)]))
    return torch.cat(parts, dim=-1)
