"""The sparse backends, each as four plain things: whether it takes a weight, how it packs it, how it multiplies, and the
variants (tiles, algorithms, cluster sizes) that the dispatcher may try. Dense is none of them: it is what they must beat.

Legend: T tokens, O outputs, K inputs.
"""

import functools
import importlib.util
import shutil
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raysearch.kernels import bitmap, cpu, decode, keys, semi24
from raysearch.kernels.weight import SparseWeight
from raysearch.pruning.selection import MAGNITUDES, Passes

MIN_SEMI24_TOKENS = 256
"""Few tokens do not fill a GPU: 1,024 of 1600 x 6400 are 25 tiles of 128 x 128 for 132 multiprocessors, and 2:4 loses
(0.75 x, docs/kernels.md)."""


class Backend(NamedTuple):
    name: str
    variants: Callable[[SparseWeight, torch.dtype, torch.device, int], list[Any]]
    """Variants for a weight, a dtype, a device and a number of tokens; none where the backend does not take it."""
    pack: Callable[[SparseWeight, torch.device], Any]
    """The weight in the backend's layout, a NamedTuple; one for all variants."""
    run: Callable[[Tensor, Any, Tensor | None, Any], Tensor]
    """x [T, K], packed, bias [O] or None, variant -> [T, O]; waits for nothing, so that a CUDA graph can hold it."""


def _runs_on_hopper(device: torch.device, library: Callable[[], Any]) -> bool:
    return device.type == "cuda" and hopper(device.index or 0) and compiles("nvcc", library)


def _decode_variants(weight: SparseWeight, dtype: torch.dtype, device: torch.device, num_tokens: int) -> list[Any]:
    if not _runs_on_hopper(device, decode.library):
        return []
    return [cluster for cluster in decode.CLUSTERS if decode.fits_decode(weight, dtype, num_tokens, cluster)]


def _bitmap_variants(weight: SparseWeight, dtype: torch.dtype, device: torch.device, num_tokens: int) -> list[Any]:
    if not _runs_on_hopper(device, bitmap.library):
        return []
    return [variant for variant in bitmap.VARIANTS if bitmap.fits_bitmap(weight, dtype, num_tokens, variant)]


def _semi24_variants(weight: SparseWeight, dtype: torch.dtype, device: torch.device, num_tokens: int) -> list[Any]:
    if device.type != "cuda" or num_tokens < MIN_SEMI24_TOKENS or not torch.backends.cusparselt.is_available():
        return []
    return list(semi24.ALGORITHMS) if semi24.fits_semi24(weight, dtype) else []


def selection_passes(passes: Passes, device: torch.device) -> Passes:
    """MAGNITUDES or SCORES of exact selection, as they are fastest on this device."""
    if device.type != "cuda" or not compiles("nvcc", keys.library):
        return passes
    return keys.MAGNITUDES if passes is MAGNITUDES else keys.SCORES


def _block_variants(weight: SparseWeight, dtype: torch.dtype, device: torch.device, num_tokens: int) -> list[Any]:
    if (device.type != "cuda" or weight.pattern != "block" or dtype not in (torch.bfloat16, torch.float16)
            or importlib.util.find_spec("triton") is None):
        return []
    from raysearch.kernels import block  # triton is a part of torch for CUDA only

    tiles = block.MANY_TOKENS if num_tokens > block.FEW else block.FEW_TOKENS
    return list(tiles) if weight.shape[1] % 8 == 0 else []


def _pack_block(weight: SparseWeight, device: torch.device) -> Any:
    from raysearch.kernels import block

    return block.pack_block(weight, device)


def _run_block(x: Tensor, packed: Any, bias: Tensor | None, tile: Any) -> Tensor:
    from raysearch.kernels import block

    return block.block_linear(x if x.stride(-1) == 1 else x.contiguous(), packed, bias, block.Tile(*tile))


def _csr_variants(weight: SparseWeight, dtype: torch.dtype, device: torch.device, num_tokens: int) -> list[Any]:
    fits = device.type == "cpu" and weight.block == 1 and dtype == torch.float32
    return [0] if fits and compiles("g++", cpu.library) else []


def _amx_variants(weight: SparseWeight, dtype: torch.dtype, device: torch.device, num_tokens: int) -> list[Any]:
    fits = device.type == "cpu" and weight.block % cpu.TILE == 0 and dtype == torch.bfloat16
    return [0] if fits and compiles("g++", cpu.library) and cpu.has_amx() else []


# where nothing is timed, a weight gets the first of these that takes it (models/sparse.py)
BACKENDS = {
    backend.name: backend for backend in (
        Backend("block", _block_variants, _pack_block, _run_block),
        Backend("2:4", _semi24_variants, semi24.pack_semi24, semi24.semi24_linear),
        Backend("decode", _decode_variants, decode.pack_decode, decode.decode_linear),
        Backend("bitmap", _bitmap_variants, bitmap.pack_bitmap, bitmap.bitmap_linear),
        Backend("csr", _csr_variants, lambda weight, _: cpu.pack_csr(weight),
                lambda x, packed, bias, _: cpu.csr_linear(x, packed, bias)),
        Backend("amx", _amx_variants, lambda weight, _: cpu.pack_tiles(weight),
                lambda x, packed, bias, _: cpu.tiles_linear(x, packed, bias)),
    )
}


@functools.cache
def compiles(compiler: str, library: Callable[[], Any]) -> bool:
    """Whether the compiler is there and compiles the kernels; where it does not, that is said once."""
    try:
        library()
    except OSError as error:
        reason = str(error) if shutil.which(compiler) else f"no {compiler} on the PATH"
        warnings.warn(f"slower products and selections run instead of compiled kernels: {reason}", stacklevel=2)
        return False
    return True


@functools.cache
def hopper(index: int) -> bool:
    """Whether the GPU runs what HOPPER_NVCC compiles: code for sm_90 runs on no later generation."""
    return torch.cuda.get_device_capability(index)[0] == 9
