"""Histograms of magnitudes on a GPU: `pruning.selection.magnitude_counts` of all pieces in one launch.

bincount waits for the device at each chunk and reads a weight four times. Counting is adding to L2, one address at a time, so
what heaps up in one bin is summed in registers first: bin 0, which holds pruned weights and, in the second histogram, all
masters of a bf16 checkpoint.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
BLOCKS_PER_PROGRAM = 8


def magnitude_counts(pieces: Sequence[Tensor], low_bit: int, num_bins: int, prefix: int) -> Tensor:
    """int32 [pieces, num_bins] of flat contiguous pieces, all on one device; the meaning is that of `pruning.selection`."""
    device = pieces[0].device if pieces else torch.device("cpu")
    counts = torch.zeros(len(pieces), num_bins, dtype=torch.int32, device=device)
    length = max((piece.numel() for piece in pieces), default=0)
    if length:
        whole = [piece.detach().float() for piece in pieces]  # a copy of bf16 and fp16, alive until the launch
        table = torch.tensor([[piece.data_ptr(), piece.numel()] for piece in whole], dtype=torch.int64).to(device)
        _count[(triton.cdiv(length, BLOCK * BLOCKS_PER_PROGRAM), len(whole))](
            table, counts, prefix, low_bit, NUM_BINS=num_bins, WIDTH=num_bins.bit_length() - 1, BLOCK=BLOCK, num_warps=8)
    return counts


@triton.jit(do_not_specialize=["prefix", "low_bit"])
def _count(table_ptr, counts_ptr, prefix, low_bit, NUM_BINS: tl.constexpr, WIDTH: tl.constexpr,  # type: ignore[no-untyped-def]
           BLOCK: tl.constexpr):
    piece = tl.program_id(1)
    weights = tl.load(table_ptr + 2 * piece).to(tl.pointer_type(tl.int32))
    length = tl.load(table_ptr + 2 * piece + 1)
    row = counts_ptr + piece.to(tl.int64) * NUM_BINS
    num_zero = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, length, tl.num_programs(0) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < length
        high = (tl.load(weights + place, mask=inside, other=0) & 0x7FFFFFFF) >> low_bit
        inside &= high >> WIDTH == prefix
        index = high & (NUM_BINS - 1)
        num_zero += (inside & (index == 0)).to(tl.int32)
        tl.atomic_add(row + index, 1, mask=inside & (index != 0), sem="relaxed")
    tl.atomic_add(row, tl.sum(num_zero), sem="relaxed")
