"""Every backend that this machine can run gives the product, whatever the shape, the mask, the dtype and the strides."""

from typing import Any

import pytest
import torch
from layers import SHAPES, assert_product, mask_of

from raysearch.kernels import cpu, decode
from raysearch.kernels.backends import BACKENDS, compiles
from raysearch.kernels.weight import compress

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                                                reason="needs a CUDA device")])]
LARGE = [(512, 1024), (80, 11008), (96, 11008)]
"""Of weights on a GPU: more inputs than a block's threads or warps take at once, an odd and an even number of 16 outputs."""
PATTERNS = [("unstructured", 1), ("2:4", 1), ("block", 16), ("block", 32), ("block", 64), ("block", 128)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("pattern", "block"), PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(device: str, pattern: str, block: int, dtype: torch.dtype) -> None:
    num_runs = 0
    torch.manual_seed(1)
    for shape in [*SHAPES, *LARGE] if device == "cuda" else SHAPES:
        for sparsity in (0.0, 0.5, 0.95, 1.1):  # nothing, some, much and everything pruned
            mask = mask_of(pattern, block, shape, sparsity).to(device)
            dense = torch.where(mask, torch.randn(shape, device=device), 0).to(dtype)
            weight = compress(dense, mask, pattern, block)
            bias = torch.randn(shape[0], device=device).to(dtype)
            packs: dict[str, Any] = {}
            for num_tokens in (1, 2, 3, 8, 16, 33, 200, 300):
                wide = torch.randn(num_tokens, shape[1] + 8, device=device).to(dtype)
                x = wide[:, :shape[1]]  # not contiguous
                for name, backend in BACKENDS.items():
                    for variant in backend.variants(weight, dtype, weight.values.device, num_tokens):
                        if name not in packs:
                            packs[name] = backend.pack(weight, weight.values.device)
                        packed = packs[name]
                        assert_product(backend.run(x, packed, bias, variant), x, dense, bias)
                        assert_product(backend.run(x, packed, None, variant), x, dense, None)
                        num_runs += 1
    if device == "cpu" and pattern in ("unstructured", "2:4") and dtype == torch.float32 and compiles("g++", cpu.library):
        assert num_runs == len(SHAPES) * 4 * 8


def test_bad_weights_are_refused() -> None:
    blocks = mask_of("block", 32, (64, 64), 0.5)
    block_weight = compress(torch.ones(64, 64), blocks, "block", 32)
    single = compress(torch.ones(64, 64), blocks)
    with pytest.raises(ValueError, match="CSR kernel needs single weights in float32, got blocks of 32"):
        cpu.pack_csr(block_weight)
    with pytest.raises(ValueError, match="AMX kernel needs blocks of 32, 64 or 128 in bfloat16, got blocks of 1"):
        cpu.pack_tiles(single)
    with pytest.raises(ValueError, match="decode kernel needs single weights in bfloat16, got blocks of 1 in torch.float32"):
        decode.pack_decode(single, "cpu")
