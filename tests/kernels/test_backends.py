"""Every backend that this machine can run gives the product, whatever the shape, the mask, the dtype and the strides."""

import itertools
from typing import Any

import pytest
import torch
from layers import SHAPES, assert_product, mask_of

from raysearch.kernels import bitmap, cpu, decode
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


@pytest.mark.parametrize(("shape", "sparsity"), [((70, 200), 0.5), ((34, 64), 0.99), ((33, 72), 1.1), ((40, 12320), 0.97),
                                                 ((256, 1024), 0.0)])
def test_the_decode_layout_holds_the_weight(shape: tuple[int, int], sparsity: float) -> None:
    mask = mask_of("unstructured", 1, shape, sparsity)
    dense = torch.where(mask, torch.randn(shape), 0).bfloat16()
    packed = decode.pack_decode(compress(dense, mask), "cpu")
    num_chunks, chunk = decode.chunks(shape[1])
    groups = torch.repeat_interleave(torch.arange(len(packed.starts) - 1), packed.starts.diff().long())
    slots = (packed.bases.int() & 0xFFFF)[..., None] + packed.offsets.int()  # [octets, 32, 8]
    assert (slots % decode.SLOTS < 8).all()  # the ninth holds nothing
    columns = slots // decode.SLOTS * 8 + slots % decode.SLOTS
    first = (groups % num_chunks * chunk)[:, None, None]
    assert ((columns >= first) & (columns < first + chunk)).all()  # no lane reads beyond its block's inputs
    rows = ((groups // num_chunks * 32)[:, None, None] + torch.arange(32)[:, None]).expand_as(columns)
    found = torch.zeros(-(-shape[0] // 32) * 32, num_chunks * chunk, dtype=torch.float64)
    found.index_put_((rows, columns.long()), packed.values.double(), accumulate=True)
    assert torch.equal(found[:shape[0], :shape[1]], dense.double())
    assert found.count_nonzero() == dense.count_nonzero()


@pytest.mark.parametrize(("shape", "sparsity"), [((70, 200), 0.5), ((34, 64), 0.99), ((33, 72), 1.1), ((16, 392), 0.0),
                                                 ((600, 256), 0.7)])
def test_the_bitmap_layout_holds_the_weight(shape: tuple[int, int], sparsity: float) -> None:
    mask = mask_of("unstructured", 1, shape, sparsity)
    dense = torch.where(mask, torch.randn(shape), 0).bfloat16()
    packed = bitmap.pack_bitmap(compress(dense, mask), "cpu")
    assert packed.pairs == (sparsity >= 0.7)
    head, num_stages = 1 if packed.pairs else 2, -(-shape[1] // 128)
    found = torch.zeros(-(-shape[0] // 16) * 16, num_stages * 128, dtype=torch.bfloat16)
    for stage, (start, stop) in enumerate(zip(packed.starts.tolist(), packed.starts[1:].tolist())):
        units = packed.data[start:stop]
        bits = units[:head].reshape(32, -1, 1) >> torch.arange(8, dtype=torch.uint8) & 1  # [lane, byte, bit]
        words = units[head:].view(torch.int32).T.contiguous()  # [lane, row]
        num_rows, num_streams = stop - start - head, 1 if packed.pairs else 2
        streams = (words if packed.pairs else words.view(torch.int16)).view(32, num_rows, num_streams)
        for lane in range(32):
            kept = bits[lane].view(streams.shape[2], 32).bool()
            items = torch.zeros(kept.shape, dtype=streams.dtype)
            for stream in range(len(kept)):
                items[stream, kept[stream]] = streams[lane, :int(kept[stream].sum()), stream]
            rows = stage // num_stages * 16 + lane // 4
            columns = stage % num_stages * 128 + lane % 4 * 8
            fragment = items.view(torch.bfloat16).view(8, 2, 2, 2)  # [tile, upper inputs, lower outputs, pair]
            for tile, upper, lower in itertools.product(range(8), range(2), range(2)):
                place = columns + tile // 2 * 32 + tile % 2 * 4 + upper * 2
                found[rows + lower * 8, place:place + 2] = fragment[tile, upper, lower]
    assert torch.equal(found[:shape[0], :shape[1]], dense)
    assert found.count_nonzero() == dense.count_nonzero()


def test_a_bitmap_kernel_that_takes_two_tiles_needs_an_even_number() -> None:
    for outputs, fits in ((80, [(1, 1)]), (96, list(bitmap.VARIANTS)), (33, [(1, 1)])):
        weight = compress(torch.ones(outputs, 1024).bfloat16(), torch.rand(outputs, 1024) < 0.5)
        assert [v for v in bitmap.VARIANTS if bitmap.fits_bitmap(weight, torch.bfloat16, 4, v)] == fits


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
