"""The CPU kernels: threads, and the layout of AMX tiles."""

import pytest
import torch
from layers import assert_product, mask_of

from raysearch.kernels import cpu
from raysearch.kernels.backends import compiles
from raysearch.kernels.weight import compress


@pytest.mark.parametrize("num_threads", [1, 2])
def test_csr_shares_tokens_among_threads(num_threads: int) -> None:
    if not compiles("g++", cpu.library):
        pytest.skip("no compiler")
    mask = mask_of("unstructured", 1, (130, 300), 0.7)
    dense = torch.where(mask, torch.randn(130, 300), 0)
    packed, x = cpu.pack_csr(compress(dense, mask)), torch.randn(333, 300)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert_product(cpu.csr_linear(x, packed, None), x, dense, None)
    finally:
        torch.set_num_threads(before)


def test_amx_tiles_hold_the_weight() -> None:
    for block, shape in [(32, (72, 200)), (64, (130, 100)), (128, (300, 260))]:
        mask = mask_of("block", block, shape, 0.5)
        dense = torch.where(mask, torch.randn(shape), 0).bfloat16()
        packed = cpu.pack_tiles(compress(dense, mask, "block", block))
        rows = torch.repeat_interleave(torch.arange(len(packed.starts) - 1), packed.starts.diff().long())
        found = torch.zeros(-(-shape[0] // 32) * 32, -(-shape[1] // 32) * 32)
        for row, column, tile in zip(rows.tolist(), packed.columns.tolist(), packed.blocks.float()):
            found[row * 32:row * 32 + 32, column * 32:column * 32 + 32] = tile.permute(0, 2, 1, 3).reshape(32, 32)
        assert torch.equal(found[:shape[0], :shape[1]], dense.float())
