"""One sparse weight: which blocks are kept, one bit each, and their values. These are the bytes that the export writes.

Legend: O output units, K input units, b block side (1 for single weights), R = ceil(O / b) and C = ceil(K / b).

A 2:4 weight needs no format of its own: its bitmap takes 4 bits for 4 weights, exactly the two 2-bit indices of the
hardware's format, and its values half of the dense ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PATTERNS = ("unstructured", "2:4", "block")
BLOCKS = (128, 64, 32, 16)
"""Block sides that the block kernels take, largest first."""
SLAB_ROWS = 1024
"""Outputs that are made dense at a time, where a weight has to be: the kept weights are served without the whole dense form."""


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A weight [O, K] in which only the kept blocks have values; made by `compress`, checked on creation.

    `bits` is uint8 [ceil(R * C / 8)], one bit per block in row-major order, least significant first; `values` is
    [num_kept, b, b] in the same order, zeros beyond the edge of a ragged weight. Raises ValueError when they do not fit.
    """

    shape: tuple[int, int]
    pattern: str
    block: int
    bits: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}")
        if self.block != 1 and (self.pattern != "block" or self.block not in BLOCKS):
            raise ValueError(f"block must be 1, or one of {BLOCKS} for pattern block; got {self.block} for {self.pattern}")
        rows, columns = self.grid
        if self.bits.dtype != torch.uint8 or self.bits.shape != ((rows * columns + 7) // 8,):
            raise ValueError(f"bits must be uint8 of {(rows * columns + 7) // 8} bytes for a weight of {self.shape} in "
                             f"blocks of {self.block}, got {self.bits.dtype} of {tuple(self.bits.shape)}")
        num_kept = int(self.kept(0, rows).sum())
        if self.values.shape != (num_kept, self.block, self.block):
            raise ValueError(f"values must be {(num_kept, self.block, self.block)} for {num_kept} kept blocks of "
                             f"{self.block}, got {tuple(self.values.shape)}")

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks down and across, (R, C)."""
        return -(-self.shape[0] // self.block), -(-self.shape[1] // self.block)

    @property
    def num_bytes(self) -> int:
        """Bytes stored: what the export writes and the reports show."""
        return self.bits.numel() + self.values.numel() * self.values.itemsize

    @property
    def density(self) -> float:
        """Kept blocks over all blocks."""
        return len(self.values) / (self.grid[0] * self.grid[1])

    def kept(self, start: int, stop: int) -> Tensor:
        """Which blocks of the block rows start..stop are kept: bool [stop - start, C], on the bits' device."""
        columns = self.grid[1]
        first = start * columns // 8
        places = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        bits = (self.bits[first:-(-stop * columns // 8), None] >> places & 1).view(-1)
        offset = start * columns - 8 * first
        return bits[offset:offset + (stop - start) * columns].view(-1, columns).bool()

    @cached_property
    def slabs(self) -> "list[tuple[int, int, int]]":
        """(first block row, last block row + 1, index of its first value) of slabs of about SLAB_ROWS rows."""
        step = max(1, SLAB_ROWS // self.block)
        slabs, value = [], 0
        for start in range(0, self.grid[0], step):
            stop = min(start + step, self.grid[0])
            slabs.append((start, stop, value))
            value += int(self.kept(start, stop).sum())
        return slabs

    def slab(self, start: int, stop: int, value: int) -> Tensor:
        """Dense rows [min(O, stop * b) - start * b, K] of the block rows start..stop; waits for nothing on a GPU."""
        kept, b = self.kept(start, stop), self.block
        dense = self.values.new_zeros(*kept.shape, b, b)
        dense.masked_scatter_(kept[:, :, None, None].expand_as(dense), self.values[value:])
        rows = min(self.shape[0], stop * b) - start * b
        return dense.transpose(1, 2).reshape(-1, kept.shape[1] * b)[:rows, :self.shape[1]].contiguous()

    def check_single(self, dtype: torch.dtype, kernel: str) -> None:
        """ValueError unless the weight is made of single values in `dtype`, as this kernel needs."""
        if self.block != 1 or self.values.dtype != dtype:
            raise ValueError(f"the {kernel} kernel needs single weights in {str(dtype).removeprefix('torch.')}, got blocks of "
                             f"{self.block} in {self.values.dtype}")

    def to_dense(self) -> Tensor:
        """The weight [O, K], bit for bit what was compressed under its mask."""
        return torch.cat([self.slab(*slab) for slab in self.slabs])

    def mask(self) -> Tensor:
        """bool [O, K], True where a block is kept: bit for bit the mask that it was compressed under."""
        return _spread(self.kept(0, self.grid[0]), self.shape, self.block)

    def transposed(self) -> "SparseWeight":
        """The weight [K, O], unstructured or in blocks, made without its dense form."""
        rows, columns = self.kept(0, self.grid[0]).nonzero(as_tuple=True)
        order = (columns * self.grid[0] + rows).argsort()
        kept = torch.zeros(self.grid[1], self.grid[0], dtype=torch.bool, device=self.bits.device)
        kept[columns, rows] = True
        pattern = "block" if self.pattern == "block" else "unstructured"
        return SparseWeight((self.shape[1], self.shape[0]), pattern, self.block, pack_bits(kept),
                            self.values[order].transpose(1, 2).contiguous())

    def moved(self, fn: Callable[[Tensor], Tensor]) -> "SparseWeight":
        """The same with `fn` applied to its values, on the device where they then are."""
        values = fn(self.values)
        return SparseWeight(self.shape, self.pattern, self.block, self.bits.to(values.device), values)


def compress(weight: Tensor, mask: Tensor, pattern: str = "unstructured", block: int = 1) -> SparseWeight:
    """The weight [O, K] under a bool mask [O, K] (True = keep), in blocks of `block` for pattern "block".

    Raises ValueError for a mask of another shape or dtype, one that keeps more than 2 of 4 consecutive inputs under
    pattern "2:4", and one that cuts through a block under pattern "block".
    """
    if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"weight must be a non-empty floating point matrix, got {weight.dtype} {tuple(weight.shape)}")
    if mask.dtype != torch.bool or mask.shape != weight.shape or mask.device != weight.device:
        raise ValueError(f"mask must be bool {tuple(weight.shape)} on {weight.device}, got {mask.dtype} {tuple(mask.shape)} "
                         f"on {mask.device}")
    if (pattern == "block") != (block in BLOCKS):
        raise ValueError(f"pattern block needs a block of {BLOCKS} and no other pattern has one; got {block} for {pattern}")
    if pattern == "2:4":
        most = int(_tiles(mask, 1, 4).sum(dim=-1).max())
        if most > 2:
            raise ValueError(f"pattern 2:4 keeps at most 2 of 4 consecutive inputs; the mask keeps {most}")
    tiles = _tiles(mask, block, block).flatten(2)
    kept = tiles.any(dim=-1)
    if pattern == "block" and not torch.equal(_spread(kept, mask.shape, block), mask):
        raise ValueError(f"pattern block of {block} keeps or drops whole blocks; the mask cuts through one")
    values = _tiles(weight.detach(), block, block)[kept].contiguous()
    return SparseWeight((weight.shape[0], weight.shape[1]), pattern, block, pack_bits(kept), values)


def pack_bits(kept: Tensor) -> Tensor:
    """uint8, one bit for each bool of `kept` in row-major order, least significant first, on its device."""
    flat = torch.nn.functional.pad(kept.reshape(-1).byte(), (0, -kept.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=kept.device)).sum(dim=1, dtype=torch.uint8)


def detect_pattern(mask: Tensor) -> tuple[str, int]:
    """The most useful (pattern, block) of a bool mask [O, K]: the largest block, then 2:4, then single weights.

    A mask that keeps everything is unstructured: no pattern would help.
    """
    if bool(mask.all()):
        return "unstructured", 1
    for block in BLOCKS:
        kept = _tiles(mask, block, block).flatten(2).any(dim=-1)
        if torch.equal(_spread(kept, mask.shape, block), mask):
            return "block", block
    if int(_tiles(mask, 1, 4).sum(dim=-1).max()) <= 2:
        return "2:4", 1
    return "unstructured", 1


def random_mask(shape: tuple[int, int], pattern: str, block: int, density: float, chance: torch.Generator | None = None,
                device: torch.device | None = None) -> Tensor:
    """bool [O, K] of about that density: for timing what a pattern gains."""
    rows, columns = shape
    if pattern == "2:4":
        order = torch.rand(rows, -(-columns // 4), 4, generator=chance, device=device).argsort(dim=-1)
        return (order < 2).view(rows, -1)[:, :columns]
    kept = torch.rand(-(-rows // block), -(-columns // block), generator=chance, device=device) < density
    return kept.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns].contiguous()


def _tiles(matrix: Tensor, height: int, width: int) -> Tensor:
    """[ceil(O / height), ceil(K / width), height, width], padded with zeros."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % width, 0, -rows % height))
    return padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width).transpose(1, 2)


def _spread(kept: Tensor, shape: torch.Size, block: int) -> Tensor:
    """The mask [O, K] that keeps exactly the kept blocks."""
    return kept.repeat_interleave(block, 0).repeat_interleave(block, 1)[:shape[0], :shape[1]]
