"""The passes of `pruning.selection` over what lies on a GPU (keys.cu): all shards in one launch, at memory's speed.

torch's bincount adds to global memory, where equal keys wait for each other, and waits for the device at each chunk.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from raysearch.kernels.compiled import NVCC, build
from raysearch.pruning import selection
from raysearch.pruning.selection import Passes

WEIGHTS_PER_BLOCK = 1 << 18
"""At 2^17 to 2^19 a pass over 650 M weights takes 0.64 ms, 4.1 TB/s (H200, 2026-11-25)."""


@functools.cache
def library() -> ctypes.CDLL:
    """The passes, compiled for this machine's GPU; OSError without nvcc."""
    major, minor = torch.cuda.get_device_capability()
    lib = build(Path(__file__).with_name("keys.cu"), (*NVCC, f"-arch=sm_{major}{minor}"))
    lib.count_keys.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, *[ctypes.c_int] * 4, ctypes.c_void_p]
    lib.mask_keys.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_void_p]
    lib.keys_error.restype = ctypes.c_char_p
    return lib


def _launch(function: Callable[..., int], shards: Sequence[Tensor], keys: Sequence[int], masks: Sequence[Tensor],
            ends: Sequence[int], *arguments: object) -> None:
    whole = [shard.detach().float() for shard in shards]  # a copy of bf16 and fp16, kept until the launch
    rows = [[shard.data_ptr(), shard.numel(), key, mask.data_ptr(), end]
            for shard, key, mask, end in zip(whole, keys, masks, ends, strict=True)]
    table = torch.tensor(rows, dtype=torch.int64).to(shards[0].device)
    num_blocks = -(-max(shard.numel() for shard in shards) // WEIGHTS_PER_BLOCK)
    with torch.cuda.device(shards[0].device):
        error = function(table.data_ptr(), *arguments, len(shards), num_blocks, torch.cuda.current_stream().cuda_stream)
    if error:
        raise RuntimeError(f"a pass over keys was not launched: {library().keys_error(error).decode()}")


def _passes(like: Passes, of_scores: bool, digits: tuple[int, ...]) -> Passes:
    def counts(shards: Sequence[Tensor], low_bit: int, width: int, prefixes: Sequence[int]) -> Tensor:
        histograms = torch.zeros(len(shards), 1 << width, dtype=torch.int32, device=shards[0].device)
        if any(shard.numel() for shard in shards):
            _launch(library().count_keys, shards, prefixes, shards, [0] * len(shards), of_scores, histograms.data_ptr(),
                    low_bit, width)
        return histograms

    def masks(shards: Sequence[Tensor], thresholds: Sequence[int], ends: Sequence[int]) -> list[Tensor]:
        keep = [torch.empty(shard.shape, dtype=torch.bool, device=shard.device) for shard in shards]
        if any(shard.numel() for shard in shards):
            _launch(library().mask_keys, shards, thresholds, keep, ends, of_scores)
        return keep

    return like._replace(digits=digits, counts=counts, masks=masks)


MAGNITUDES = _passes(selection.MAGNITUDES, False, (11, 10, 10))
SCORES = _passes(selection.SCORES, True, (11, 11, 10))
"""As those of `pruning.selection`, of shards on one GPU, in three passes: histograms of 8 to 13 bits lie in shared memory,
where a pass over 650 M weights takes 0.64 ms; 16 bits at once, in L2, took 48 ms (H200, docs/log.md, 2026-11-25)."""
