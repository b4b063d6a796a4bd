"""2:4 products through cuSPARSELt: y [T, O] = x [T, K] W[O, K]^T + bias, on the sparse tensor cores.

cuSPARSELt's default algorithm, 0, is far from its best one on a Hopper GPU (1.0 and 1.6 times dense at 4096 x 11008, 16384
tokens), so the best few are variants to time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from raysearch.kernels.weight import SparseWeight

ALGORITHMS = (17, 12, 20, 0)
"""The fastest of cuSPARSELt 0.8.0's 21 on every shape tried (H200, 2026-11-25), and its default."""


class Semi24Packed(NamedTuple):
    shape: tuple[int, int]
    compressed: Tensor
    """cuSPARSELt's own layout: half of the values and 2 bits for each of them."""


def fits_semi24(weight: SparseWeight, dtype: torch.dtype) -> bool:
    """Whether cuSPARSELt takes the weight: pattern 2:4, 16 bits, outputs and inputs in sixteens."""
    return (weight.pattern == "2:4" and dtype in (torch.bfloat16, torch.float16)
            and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0)


def pack_semi24(weight: SparseWeight, device: torch.device | str) -> Semi24Packed:
    """The weight as cuSPARSELt stores it; its dense form exists while it is packed."""
    return Semi24Packed(weight.shape, torch._cslt_compress(weight.to_dense().to(device)))


def semi24_linear(x: Tensor, packed: Semi24Packed, bias: Tensor | None, algorithm: int) -> Tensor:
    """[T, O] in x's dtype, fp32 sums; x [T, K] is padded to a multiple of 8 tokens, which cuSPARSELt asks for."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 8)) if len(x) % 8 else x
    return torch._cslt_sparse_mm(packed.compressed, padded.t(), bias, transpose_result=True, alg_id=algorithm)[:len(x)]
