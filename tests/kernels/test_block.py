"""The Triton kernel through Triton's interpreter, which must be asked for before triton is imported: a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from layers import SHAPES, assert_product, mask_of
from raysearch.kernels.block import Tile, block_linear, pack_block
from raysearch.kernels.weight import compress

torch.manual_seed(0)
for block in (16, 32, 64, 128):
    for shape in SHAPES[:4]:
        for sparsity in (0.0, 0.6, 1.1):
            mask = mask_of("block", block, shape, sparsity)
            dense = torch.where(mask, torch.randn(shape), 0)
            packed = pack_block(compress(dense, mask, "block", block), "cpu")
            bias = torch.randn(shape[0])
            for num_tokens, tile in ((1, Tile(16, 32, 4, 1, False)), (40, Tile(32, 128, 4, 1, False))):
                x = torch.randn(num_tokens, shape[1])
                assert_product(block_linear(x, packed, bias, tile), x, dense, bias)
print("all right")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_products_in_the_interpreter() -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=250)
    assert run.stdout.strip() == "all right", run.stderr[-3000:]
