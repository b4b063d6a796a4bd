"""Unstructured product for few tokens (decode.cu): y [T, O] = x [T, K] W[O, K]^T + bias in bf16, on Hopper GPUs.

A kept weight takes 3.25 bytes: 2 of its value, 1 of its input's offset, and an eighth of a base of 2 bytes, with some
padding. That is less than the 2 bytes of a dense weight from 40 % sparsity on.

Legend: O outputs, K inputs, n kept weights, E entries; a list holds the entries of one output in one chunk of the inputs,
in octets; the 32 lists that the lanes of a warp walk together have equally many octets.
"""

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from raysearch.kernels.compiled import HOPPER_NVCC, build
from raysearch.kernels.weight import SparseWeight

MAX_TOKENS = 8
MAX_INPUTS = 57_344
"""A slot is told in 16 bits."""
CLUSTERS = (1, 2, 4, 8)
"""Blocks that share the inputs of the same outputs: the variants to try."""
CHUNK = 12_288
"""Most inputs of a chunk: with 8 tokens they take 216 KiB of shared memory."""
SHARED_BYTES = 227 * 1024
"""What a block may take on Hopper."""
SLOTS = 9
"""Of 8 inputs in shared memory, so that lanes which write 8 inputs each write to different banks: 3 us less with four
tokens, 6 us with eight (docs/kernels.md)."""
MAX_OFFSET = 255
"""Of an entry from its octet's base: a byte."""
GAP = 31
"""Most inputs from one entry of a list to the next: 7 gaps then fit into a byte. A zero weight stands between others."""
NOWHERE = SLOTS << 20
"""The slot of a cell without an entry: above every real one, so that a minimum leaves it out."""
MAX_WINDOW = 8
"""Most octets whose entries may change places: within one octet two thirds of the entries find a place of their own bank,
within 8 octets 91, 88 and 76 % at 50, 70 and 90 % sparsity (docs/kernels.md)."""


class DecodePacked(NamedTuple):
    """A weight as the kernel reads it, all on one device."""

    shape: tuple[int, int]
    chunk: int
    """Inputs of a chunk."""
    starts: Tensor
    """int32 [ceil(O / 32) * chunks + 1], first octet of each group of 32 lists."""
    values: Tensor
    """bf16 [octets, 32, 8]."""
    offsets: Tensor
    """uint8 [octets, 32, 8], input of each value after its base."""
    bases: Tensor
    """int16 [octets, 32], to be read without a sign."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel; OSError without nvcc."""
    lib = build(Path(__file__).with_name("decode.cu"), HOPPER_NVCC)
    lib.decode_linear.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int] * 6 + [ctypes.c_void_p]
    lib.decode_error.restype = ctypes.c_char_p
    return lib


def chunks(num_inputs: int) -> tuple[int, int]:
    """(number of chunks, inputs of each): a power of two, at least 2, so that clusters can share them."""
    number = 2
    while number * CHUNK < num_inputs:
        number *= 2
    return number, -(-num_inputs // number // 8) * 8


def fits_decode(weight: SparseWeight, dtype: torch.dtype, num_tokens: int, cluster: int) -> bool:
    """Whether the kernel takes the weight and so many tokens with this cluster."""
    number, chunk = chunks(weight.shape[1])
    bytes_per_input = 4 if num_tokens == 1 else 2 * (1 << (num_tokens - 1).bit_length())
    return (weight.block == 1 and dtype == torch.bfloat16 and 0 < num_tokens <= MAX_TOKENS and weight.shape[1] % 8 == 0
            and weight.shape[1] <= MAX_INPUTS and number % cluster == 0
            and number // cluster * chunk // 8 * SLOTS * bytes_per_input <= SHARED_BYTES)


def pack_decode(weight: SparseWeight, device: torch.device | str) -> DecodePacked:
    """The weight in the kernel's layout on `device`; ValueError unless it is made of single bf16 weights."""
    weight.check_single(torch.bfloat16, "decode")
    num_outputs, num_inputs = weight.shape
    num_chunks, chunk = chunks(num_inputs)
    rows, columns = weight.kept(0, num_outputs).to(device).nonzero(as_tuple=True)
    values = weight.values.to(device).view(-1)
    num_groups = -(-num_outputs // 32) * num_chunks
    lists = (rows // 32 * num_chunks + columns // chunk) * 32 + rows % 32
    order = lists.argsort(stable=True)  # by list, then by input
    lists, columns, values = lists[order], columns[order], values[order]

    same_list = torch.cat([lists.new_zeros(1), (lists.diff() == 0).long()])[:len(lists)]
    gap = torch.cat([lists.new_zeros(1), columns.diff()])[:len(lists)] * same_list
    fillers = ((gap - 1) // GAP).clamp(min=0)
    source = torch.repeat_interleave(torch.arange(len(lists), device=rows.device), fillers + 1)
    back = _before(fillers + 1)[source + 1] - 1 - torch.arange(len(source), device=rows.device)  # 0 at the entry itself
    lists, columns = lists[source], columns[source] - GAP * back
    values = torch.where(back == 0, values[source], 0)

    counts = torch.bincount(lists, minlength=num_groups * 32).view(num_groups, 32)
    octets = (counts.amax(dim=1) + 7) // 8
    starts = _before(octets)
    slots = columns // 8 * SLOTS + columns % 8
    cells = _cells(lists, slots, _before(counts.view(-1)), starts, min(MAX_WINDOW, max(1, round(20 * weight.density))))
    packed, where = values.new_zeros(int(starts[-1]) * 256), slots.new_full((int(starts[-1]) * 256,), NOWHERE)
    packed[cells], where[cells] = values, slots
    where = where.view(-1, 32, 8)
    chunk_slots = torch.arange(num_groups, device=rows.device) % num_chunks * (chunk // 8 * SLOTS)
    bases = where.amin(dim=2) // SLOTS * SLOTS
    bases = torch.where(bases < NOWHERE, bases, chunk_slots.repeat_interleave(octets)[:, None])
    # a cell without an entry reads a slot that its neighbours do not want
    wanted = torch.arange(32, device=rows.device)[:, None] + torch.arange(8, device=rows.device)
    offsets = torch.where(where < NOWHERE, where - bases[..., None], (wanted - bases[..., None]) % 8)
    return DecodePacked(weight.shape, chunk, starts.int(), packed.view(where.shape), offsets.to(torch.uint8),
                        bases.to(torch.int16))


def decode_linear(x: Tensor, packed: DecodePacked, bias: Tensor | None, cluster: int) -> Tensor:
    """[T, O] in bf16; x [T, K]. ValueError for more than MAX_TOKENS tokens, RuntimeError when CUDA refuses."""
    if len(x) > MAX_TOKENS:
        raise ValueError(f"the decode kernel takes at most {MAX_TOKENS} tokens, got {len(x)}; use another backend for them")
    x, y = x.contiguous(), torch.empty(len(x), packed.shape[0], dtype=x.dtype, device=x.device)
    error = library().decode_linear(
        packed.starts.data_ptr(), packed.values.data_ptr(), packed.offsets.data_ptr(), packed.bases.data_ptr(),
        x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), len(x), *packed.shape, packed.chunk,
        chunks(packed.shape[1])[0], cluster, torch.cuda.current_stream().cuda_stream)
    if error:
        raise RuntimeError(f"the decode kernel was not launched: {library().decode_error(error).decode()}")
    return y


def _cells(lists: Tensor, slots: Tensor, firsts: Tensor, starts: Tensor, window: int) -> Tensor:
    """[E] where each entry goes among the cells [octets, 32 lanes, 8 places].

    Entries of a list change places within `window` octets as long as a byte tells them apart, so that lane l has at place p
    a slot s with (s - l) mod 8 = p, if there is one: 8 lanes that read 16 bytes each then read different banks. lists and
    slots [E], ordered; firsts [lists + 1] entries, starts [groups + 1] octets.
    """
    ranks = torch.arange(len(lists), device=lists.device) - firsts[lists]
    group, lane = lists // 32, lists % 32
    octet_before = starts[group] + ranks // 8
    first = starts[group] + ranks // (8 * window) * window  # of the window
    heads = torch.arange(int(starts[-1]), device=lists.device)
    group_of = torch.repeat_interleave(torch.arange(len(starts) - 1, device=lists.device), starts.diff())
    heads = starts[group_of] + (heads - starts[group_of]) // window * window
    begin = heads[:, None].repeat(1, 32)  # [octets, 32] the first octet of the window that a cell is in
    low, high = torch.full_like(begin, 1 << 40).view(-1), torch.zeros_like(begin).view(-1)
    low = low.scatter_reduce(0, first * 32 + lane, slots // SLOTS * SLOTS, "amin")
    high = high.scatter_reduce(0, first * 32 + lane, slots, "amax")
    wide = (high - low > MAX_OFFSET)[begin * 32 + torch.arange(32, device=lists.device)]  # these stay in their octets
    begin = torch.where(wide, torch.arange(len(begin), device=lists.device)[:, None], begin)
    first = begin[octet_before, lane]
    last = torch.where(wide[octet_before, lane], first + 1, torch.minimum(first + window, starts[group + 1]))
    key, place = first * 32 + lane, (slots - lane) % 8
    octet = first + _ranks(key * 8 + place)
    cells = (octet * 32 + lane) * 8 + place
    rest = (octet >= last).nonzero()[:, 0]
    taken = torch.zeros(len(begin) * 256, dtype=torch.bool, device=lists.device)
    taken[cells[octet < last]] = True
    free = (~taken).nonzero()[:, 0]
    free_keys, order = (begin.view(-1)[free // 8] * 32 + free // 8 % 32).sort(stable=True)
    cells[rest] = free[order[torch.searchsorted(free_keys, key[rest]) + _ranks(key[rest])]]
    return cells


def _before(counts: Tensor) -> Tensor:
    """[n + 1]: sums of all counts before each, and of all."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _ranks(keys: Tensor) -> Tensor:
    """How many equal keys stand before each."""
    ordered, order = keys.sort(stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(keys), device=keys.device) - torch.searchsorted(ordered, ordered)
    return ranks
