"""Sparse products on a CPU (cpu.cpp): single fp32 weights as CSR, and bf16 blocks of 32 and more on AMX tiles.

Legend: O outputs, K inputs, n kept weights or blocks, C inputs of a chunk.
"""

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from raysearch.kernels.compiled import build
from raysearch.kernels.weight import SparseWeight

CHUNK = 128
"""Inputs whose 64 tokens take 32 KiB, a core's first cache level."""
TILE = 32
"""Side of the blocks that cpu.cpp multiplies; larger ones are cut into these."""
COMPILER = ("g++", "-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC")


class CsrPacked(NamedTuple):
    shape: tuple[int, int]
    starts: Tensor
    """int32 [chunks, O + 1], first weight of each output in each chunk of inputs."""
    places: Tensor
    """int16 [n], input within its chunk."""
    weights: Tensor
    """fp32 [n]."""


class TilesPacked(NamedTuple):
    shape: tuple[int, int]
    starts: Tensor
    """int32 [ceil(O / 32) + 1], first block of each row of blocks."""
    columns: Tensor
    """int32 [n]."""
    blocks: Tensor
    """bf16 [n, 2, 16, 16, 2]: halves of the outputs, pairs of inputs, outputs, the two of a pair."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; OSError without a compiler."""
    lib = build(Path(__file__).with_name("cpu.cpp"), COMPILER)
    lib.csr_linear.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int] * 4
    lib.csr_linear.restype = None
    if hasattr(lib, "block_linear"):
        lib.block_linear.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int] * 3
        lib.block_linear.restype = None
    return lib


@functools.cache
def has_amx() -> bool:
    """Whether this CPU has AMX tiles for bf16, the compiler knows them, and Linux lets this process use them."""
    return hasattr(library(), "block_linear") and not library().amx_refused()


def pack_csr(weight: SparseWeight) -> CsrPacked:
    """The weight for `csr_linear`; ValueError unless it is made of single fp32 weights."""
    weight.check_single(torch.float32, "CSR")
    num_outputs, num_inputs = weight.shape
    num_chunks = -(-num_inputs // CHUNK)
    rows, columns = weight.kept(0, num_outputs).nonzero(as_tuple=True)
    lists = columns // CHUNK * num_outputs + rows
    order = lists.argsort(stable=True)
    counts = torch.bincount(lists, minlength=num_chunks * num_outputs)
    ends = counts.cumsum(0).view(num_chunks, num_outputs)
    starts = torch.cat([ends[:, :1] - counts.view(num_chunks, num_outputs)[:, :1], ends], dim=1)
    return CsrPacked(weight.shape, starts.int().contiguous(), (columns % CHUNK)[order].to(torch.int16),
                     weight.values.view(-1)[order])


def csr_linear(x: Tensor, packed: CsrPacked, bias: Tensor | None) -> Tensor:
    """[T, O] in fp32; x [T, K]. Tokens are shared out over torch's number of threads, 64 and more to each."""
    x, y = x.contiguous(), torch.empty(len(x), packed.shape[0])

    def run(first: int, last: int) -> None:
        library().csr_linear(packed.starts.data_ptr(), packed.places.data_ptr(), packed.weights.data_ptr(),
                             x[first:].data_ptr(), _pointer(bias), y[first:].data_ptr(), last - first, *packed.shape, CHUNK)

    _share(len(x), 64, run)
    return y


def pack_tiles(weight: SparseWeight) -> TilesPacked:
    """The weight for `tiles_linear`; ValueError unless it is made of bf16 blocks of 32, 64 or 128."""
    if weight.block % TILE or weight.values.dtype != torch.bfloat16:
        raise ValueError(f"the AMX kernel needs blocks of 32, 64 or 128 in bfloat16, got blocks of {weight.block} in "
                         f"{weight.values.dtype}")
    kept, side = weight.kept(0, weight.grid[0]), weight.block // TILE
    row, column = kept.nonzero(as_tuple=True)
    parts = torch.arange(side)
    rows = (row[:, None, None] * side + parts[:, None]).expand(-1, side, side).reshape(-1)
    columns = (column[:, None, None] * side + parts).expand(-1, side, side).reshape(-1)
    tiles = weight.values.view(-1, side, TILE, side, TILE).transpose(2, 3).reshape(-1, TILE, TILE)
    num_rows = -(-weight.shape[0] // TILE)
    inside = (rows < num_rows) & (columns < -(-weight.shape[1] // TILE))  # of a ragged edge
    rows, columns, tiles = rows[inside], columns[inside], tiles[inside]
    order = rows.argsort(stable=True)
    starts = torch.zeros(num_rows + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(rows, minlength=num_rows).cumsum(0)
    blocks = tiles[order].view(-1, 2, 16, 16, 2).transpose(2, 3).contiguous()  # [n, half, pair, output, 2]
    return TilesPacked(weight.shape, starts, columns[order].int(), blocks)


def tiles_linear(x: Tensor, packed: TilesPacked, bias: Tensor | None) -> Tensor:
    """[T, O] in bf16, fp32 sums; x [T, K] is padded to multiples of 32 where it has none."""
    num_tokens = len(x)
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % TILE, 0, -num_tokens % TILE)).contiguous()
    y = torch.empty(len(x), packed.shape[0], dtype=x.dtype)
    wide = None if bias is None else bias.float()

    def run(first: int, last: int) -> None:
        library().amx_refused()  # the permission is asked for by each thread
        library().block_linear(packed.starts.data_ptr(), packed.columns.data_ptr(), packed.blocks.data_ptr(),
                               x[first:].data_ptr(), _pointer(wide), y[first:].data_ptr(), last - first, packed.shape[0],
                               x.shape[1])

    _share(len(x), TILE, run)
    return y[:num_tokens]


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="raysearch-kernel")


def _share(num_tokens: int, unit: int, run: Callable[[int, int], None]) -> None:
    """Runs `run(first, last)` over all tokens, in multiples of `unit`, on as many threads as torch uses."""
    step = -(-num_tokens // min(torch.get_num_threads(), -(-num_tokens // unit)) // unit) * unit
    spans = [(first, min(first + step, num_tokens)) for first in range(0, num_tokens, step)]
    if len(spans) == 1:
        run(*spans[0])
        return
    for done in [_threads().submit(run, *span) for span in spans]:
        done.result()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
