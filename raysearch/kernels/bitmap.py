"""Unstructured product for few tokens on tensor cores (bitmap.cu): y [T, O] = x [T, K] W[O, K]^T + bias in bf16, on Hopper.

Legend: O outputs, K inputs, R tiles of 16 outputs, S stages of 128 inputs. A lane of a warp holds 64 weights of a stage: their
bitmap and the kept ones, in as many rows of a word for each lane as the fullest one needs.
"""

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from raysearch.kernels.compiled import HOPPER_NVCC, build
from raysearch.kernels.weight import SparseWeight, pack_bits

MAX_TOKENS = 16
VARIANTS = ((1, 2), (1, 1), (2, 2))
"""(blocks of a cluster, whose warps share the inputs; tiles of 16 outputs of each warp)."""
WARPS = 20
"""Of a block; they share single tiles, not whole stages, so that each has 8 or 9 of 172 (docs/kernels.md)."""
BARRIER_BYTES = 512
BUFFERS = 2
"""Of each warp, in shared memory, where later its sums of two tiles lie; with more of them the weights that are on their way
hold up the inputs. A stage has 34 units at most, so all warps have room."""
UNIT = 128
STAGE_INPUTS = 128
MAX_ITEMS = 32
"""Of a warp, a stage of one tile each: a lane knows where one of them lies."""
PAIRS_BELOW = 0.4
"""Density below which a bit stands for two weights, which takes more bytes and half of the instructions: at 70 % sparsity
and 16 tokens 22.4 instead of 25.6 us, at 90 % 16.8 instead of 23 (H200, docs/kernels.md)."""


class BitmapPacked(NamedTuple):
    """A weight as the kernel reads it, all on one device."""

    shape: tuple[int, int]
    pairs: bool
    """A bit and a word stand for two neighbouring inputs of which one is kept at least."""
    stage_units: int
    """Units of the longest stage."""
    starts: Tensor
    """int32 [R * S + 1], first unit of each stage."""
    data: Tensor
    """uint8 [units, 128]; of a stage: the lanes' bitmaps, then rows of a word for each lane."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel; OSError without nvcc."""
    lib = build(Path(__file__).with_name("bitmap.cu"), HOPPER_NVCC)
    lib.bitmap_linear.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 9 + [ctypes.c_void_p]
    lib.bitmap_error.restype = ctypes.c_char_p
    return lib


def pack_bitmap(weight: SparseWeight, device: torch.device | str) -> BitmapPacked:
    """The weight in the kernel's layout on `device`; ValueError unless it is made of single bf16 weights."""
    weight.check_single(torch.bfloat16, "bitmap")
    pairs, weight = weight.density < PAIRS_BELOW, weight.moved(lambda values: values.to(device))
    parts = [_pack_rows(weight.slab(*slab), pairs) for slab in weight.slabs]
    lengths = torch.cat([length for length, _ in parts])
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return BitmapPacked(weight.shape, pairs, int(lengths.max()), starts.int(), torch.cat([data for _, data in parts]))


def _pack_rows(rows: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    """(units of each stage [R * S], data [units, 128] uint8) of whole tiles of dense rows [<= 16 R, K] in bf16."""
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % STAGE_INPUTS, 0, -rows.shape[0] % 16))
    # [R, h 2, g 8, S, pair 4, q 4, tile 2, u 2] -> [R * S, lane (g, q), tile, (u, h)], a word of two weights
    words = (rows.contiguous().view(torch.int32).view(rows.shape[0] // 16, 2, 8, -1, 4, 4, 2, 2)
             .permute(0, 3, 2, 5, 4, 6, 7, 1).reshape(-1, 32, 32))
    # of a lane, the streams that lie side by side: all its words, or the weights of its first and last 4 tiles
    items = words.unsqueeze(2) if pairs else words.view(torch.int16).view(-1, 32, 2, 32)
    kept = items != 0  # [R * S, lane, stream, item]
    head = pack_bits(kept).view(len(items), -1)  # [R * S, 128 or 256] bytes
    rank = kept.cumsum(3, dtype=torch.int32)
    lengths = head.shape[1] // UNIT + rank[..., -1].amax(dim=(1, 2))
    starts = lengths.cumsum(0) - lengths
    data = torch.zeros(int(lengths.sum()), UNIT, dtype=torch.uint8, device=rows.device)
    for unit, part in enumerate(head.split(UNIT, dim=1)):
        data[starts + unit] = part
    stage, lane, stream, item = kept.nonzero(as_tuple=True)
    unit = starts[stage] + head.shape[1] // UNIT + rank[stage, lane, stream, item] - 1
    data.view(items.dtype)[unit, lane * items.shape[2] + stream] = items[stage, lane, stream, item]
    return lengths, data


def fits_bitmap(weight: SparseWeight, dtype: torch.dtype, num_tokens: int, variant: tuple[int, int]) -> bool:
    """Whether the kernel takes the weight and so many tokens with this variant."""
    num_tiles, num_items = -(-weight.shape[0] // 16), -(-weight.shape[1] // STAGE_INPUTS) * variant[1]
    return (weight.block == 1 and dtype == torch.bfloat16 and 0 < num_tokens <= MAX_TOKENS and weight.shape[1] % 8 == 0
            and num_tiles % variant[1] == 0 and num_items <= variant[0] * WARPS * MAX_ITEMS)


def bitmap_linear(x: Tensor, packed: BitmapPacked, bias: Tensor | None, variant: tuple[int, int]) -> Tensor:
    """[T, O] in bf16; x [T, K]. ValueError for more than MAX_TOKENS tokens, RuntimeError when CUDA refuses."""
    if len(x) > MAX_TOKENS:
        raise ValueError(f"the bitmap kernel takes at most {MAX_TOKENS} tokens, got {len(x)}; use another backend for them")
    x, y = x.contiguous(), torch.empty(len(x), packed.shape[0], dtype=x.dtype, device=x.device)
    error = library().bitmap_linear(
        packed.starts.data_ptr(), packed.data.data_ptr(), x.data_ptr(), None if bias is None else bias.data_ptr(),
        y.data_ptr(), len(x), *packed.shape, -(-packed.shape[1] // STAGE_INPUTS), packed.stage_units * UNIT,
        BARRIER_BYTES + WARPS * max(BUFFERS * packed.stage_units * UNIT, 2 * 16 * MAX_TOKENS * 4), *variant,
        packed.pairs, torch.cuda.current_stream().cuda_stream)
    if error:
        raise RuntimeError(f"the bitmap kernel was not launched: {library().bitmap_error(error).decode()}")
    return y
