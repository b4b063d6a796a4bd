"""Block-sparse product in Triton, tuned for Hopper: y [T, O] = x [T, K] W[O, K]^T + bias.

Legend: T tokens, O outputs, K inputs, B block side, BT tokens and BN outputs per program, STEP blocks per iteration.

A program owns BT tokens and BN outputs of one block row and walks the kept blocks of that row only. Programs of the same
tokens are neighbours, so that their slice of x stays in L2, and the longest rows start first, so that none is left over
at the end. For few tokens BN < B gives more programs: that splits the row's outputs, which needs no second pass over
partial sums as splitting K would.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from raysearch.kernels.weight import SparseWeight


class BlockPacked(NamedTuple):
    """A block weight as the kernel reads it, all on one device."""

    shape: tuple[int, int]
    block: int
    values: Tensor
    """[num_blocks, B, B], every row's blocks padded with zeros to a multiple of STEP; one where all are pruned."""
    columns: Tensor
    """int32 [num_blocks], block column of each block."""
    starts: Tensor
    """int32 [R + 1], first block of each block row."""
    order: Tensor
    """int32 [R], block rows, longest first."""


class Tile(NamedTuple):
    """Launch parameters of one variant."""

    tokens: int
    outputs: int
    num_warps: int
    num_stages: int
    bulk: bool
    """Loads through the tensor memory accelerator (TMA) instead of per-thread pointers."""


FEW = 128
FEW_TOKENS = (Tile(16, 32, 4, 5, False), Tile(32, 64, 4, 5, False), Tile(64, 64, 4, 4, False), Tile(128, 64, 4, 4, True))
MANY_TOKENS = (Tile(128, 128, 4, 5, True), Tile(128, 128, 8, 5, True), Tile(256, 128, 4, 5, True),
               Tile(256, 128, 4, 3, False), Tile(256, 128, 8, 5, False))
"""Variants for at most FEW tokens and for more: the best of each block side (H200, 2026-11-25) in first place."""


def blocks_per_step(block: int) -> int:
    """Blocks whose inputs make one product of 64 inputs."""
    return max(1, 64 // block)


def pack_block(weight: SparseWeight, device: torch.device | str) -> BlockPacked:
    """The weight in the kernel's layout on `device`; ValueError unless its pattern is block."""
    if weight.pattern != "block":
        raise ValueError(f"the block kernel needs a weight of pattern block, got {weight.pattern}")
    kept = weight.kept(0, weight.grid[0]).cpu()
    step = blocks_per_step(weight.block)
    lengths = kept.sum(dim=1)
    padded = -(-lengths // step) * step
    starts = torch.zeros(len(kept) + 1, dtype=torch.int32)
    starts[1:] = padded.cumsum(0)
    rows, columns = kept.nonzero(as_tuple=True)
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    where = starts[rows].long() + torch.arange(len(rows)) - first
    all_columns = torch.zeros(int(starts[-1]), dtype=torch.int32)
    all_columns[where] = columns.int()
    if torch.equal(padded, lengths) and len(rows):
        values = weight.values.to(device)
    else:
        values = torch.zeros(max(1, int(starts[-1])), weight.block, weight.block, dtype=weight.values.dtype, device=device)
        values[where.to(device)] = weight.values.to(device)
    return BlockPacked(weight.shape, weight.block, values, all_columns.to(device), starts.to(device),
                       lengths.argsort(descending=True, stable=True).int().to(device))


def block_linear(x: Tensor, packed: BlockPacked, bias: Tensor | None, tile: Tile) -> Tensor:
    """[T, O] in x's dtype, fp32 accumulation; x [T, K] with contiguous rows. RuntimeError when the tile does not fit."""
    num_tokens, num_inputs = x.shape
    num_outputs, block = packed.shape[0], packed.block
    y = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    outputs = min(tile.outputs, block)
    num_programs = triton.cdiv(num_tokens, tile.tokens) * len(packed.order) * (block // outputs)
    bulk = tile.bulk and block >= 64
    x_in: Any = x
    w_in: Any = packed.values
    if bulk:
        flat = packed.values.view(-1, block)
        x_in = TensorDescriptor(x, [num_tokens, num_inputs], [x.stride(0), 1], [tile.tokens, 64])
        w_in = TensorDescriptor(flat, list(flat.shape), [block, 1], [outputs, 64])
    try:
        _block_linear[(num_programs,)](
            x_in, w_in, packed.columns, packed.starts, packed.order, y if bias is None else bias, y,
            num_tokens, num_inputs, num_outputs, len(packed.order), x.stride(0),
            B=block, BT=tile.tokens, BN=outputs, STEP=blocks_per_step(block), BULK=bulk, EVEN_K=num_inputs % block == 0,
            HAS_BIAS=bias is not None, num_warps=tile.num_warps, num_stages=tile.num_stages)
    except OutOfResources as error:
        raise RuntimeError(f"the block kernel does not fit this GPU with {tile}: {error}") from error
    return y


# compiled for each class of the arguments that say how x, the weight and y are aligned, but not for each class of these two
@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _block_linear(x_ptr, w_ptr, columns_ptr, starts_ptr, order_ptr, bias_ptr, y_ptr,  # type: ignore[no-untyped-def]
                  num_tokens, num_inputs, num_outputs, num_rows, x_stride,
                  B: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, BULK: tl.constexpr,
                  EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr):
    parts: tl.constexpr = B // BN
    pid = tl.program_id(0)
    place = pid % (num_rows * parts)
    first_token = pid // (num_rows * parts) * BT
    row = tl.load(order_ptr + place // parts)
    first_output = place % parts * BN  # within the block row
    start = tl.load(starts_ptr + row)
    stop = tl.load(starts_ptr + row + 1)
    n = tl.arange(0, BN)
    k = tl.arange(0, STEP * B)
    tokens = first_token + tl.arange(0, BT)
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    if BULK:
        parts_k: tl.constexpr = B // 64
        for i in tl.range(start * parts_k, stop * parts_k):
            column = tl.load(columns_ptr + i // parts_k) * B
            x = x_ptr.load([first_token, column + i % parts_k * 64])
            w = w_ptr.load([i // parts_k * B + first_output, i % parts_k * 64])
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
    else:
        x_rows = x_ptr + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * x_stride
        w_rows = w_ptr + start.to(tl.int64) * (B * B)
        w_rows += (first_output + n)[:, None] * B + (k // B * (B * B) + k % B)[None, :]
        for i in tl.range(start, stop, STEP):
            if STEP == 1:
                inputs = tl.load(columns_ptr + i) * B + k
            else:
                inputs = tl.load(columns_ptr + i + k // B) * B + k % B
                inputs = tl.max_contiguous(tl.multiple_of(inputs, 16), 16)
            if EVEN_K:
                x = tl.load(x_rows + inputs[None, :])
            else:
                x = tl.load(x_rows + inputs[None, :], mask=(inputs < num_inputs)[None, :], other=0.0)
            w = tl.load(w_rows)
            w_rows += STEP * B * B
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
    outputs = row * B + first_output + n
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + tokens.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(tokens < num_tokens)[:, None] & (outputs < num_outputs)[None, :])
