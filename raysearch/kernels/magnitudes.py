"""The passes of `pruning.selection` over the weights of a GPU (magnitudes.cu): all shards in one launch, at memory's speed.

torch's bincount adds to global memory, where equal magnitudes wait for each other, and waits for the device at each chunk.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from raysearch.kernels.compiled import NVCC, build
from raysearch.pruning.selection import Passes, magnitude_keys

WEIGHTS_PER_BLOCK = 1 << 18
"""At 2^17 to 2^19 a pass over 650 M weights takes 0.64 ms, 4.1 TB/s (H200, 2026-11-25)."""


@functools.cache
def library() -> ctypes.CDLL:
    """The passes, compiled for this machine's GPU; OSError without nvcc."""
    major, minor = torch.cuda.get_device_capability()
    lib = build(Path(__file__).with_name("magnitudes.cu"), (*NVCC, f"-arch=sm_{major}{minor}"))
    lib.count_magnitudes.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_uint32] + [ctypes.c_int] * 4 + [ctypes.c_void_p]
    lib.mask_magnitudes.argtypes = [ctypes.c_void_p, ctypes.c_uint32] + [ctypes.c_int] * 2 + [ctypes.c_void_p]
    lib.magnitudes_error.restype = ctypes.c_char_p
    return lib


def _launch(function: Callable[..., int], shards: Sequence[Tensor], masks: Sequence[Tensor], ends: Sequence[int],
            *arguments: object) -> None:
    whole = [shard.detach().float() for shard in shards]  # a copy of bf16 and fp16, kept until the launch
    rows = [[shard.data_ptr(), shard.numel(), mask.data_ptr(), end] for shard, mask, end in zip(whole, masks, ends)]
    table = torch.tensor(rows, dtype=torch.int64).to(shards[0].device)
    num_blocks = -(-max(shard.numel() for shard in shards) // WEIGHTS_PER_BLOCK)
    with torch.cuda.device(shards[0].device):
        error = function(table.data_ptr(), *arguments, len(shards), num_blocks, torch.cuda.current_stream().cuda_stream)
    if error:
        raise RuntimeError(f"a pass over magnitudes was not launched: {library().magnitudes_error(error).decode()}")


def counts(shards: Sequence[Tensor], low_bit: int, width: int, prefix: int) -> Tensor:
    """As `pruning.selection.counts`; the shards lie on one GPU."""
    histograms = torch.zeros(len(shards), 1 << width, dtype=torch.int32, device=shards[0].device)
    if any(shard.numel() for shard in shards):
        _launch(library().count_magnitudes, shards, shards, [0] * len(shards), histograms.data_ptr(), prefix, low_bit, width)
    return histograms


def masks(shards: Sequence[Tensor], threshold: int, ends: Sequence[int]) -> list[Tensor]:
    """As `pruning.selection.masks`; the shards lie on one GPU."""
    keep = [torch.empty(shard.shape, dtype=torch.bool, device=shard.device) for shard in shards]
    if any(shard.numel() for shard in shards):
        _launch(library().mask_magnitudes, shards, keep, ends, threshold)
    return keep


PASSES = Passes(magnitude_keys, (11, 10, 10), counts, masks, lowest=0, infinity=0x7F800000)
"""31 bits of a magnitude in three passes: histograms of 8 to 13 bits lie in shared memory, where a pass over 650 M weights
takes 0.64 ms; 16 bits at once, in L2, took 48 ms (H200, docs/log.md, 2026-11-25)."""
