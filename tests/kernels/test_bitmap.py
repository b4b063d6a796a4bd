"""The bitmap kernel's layout holds the weight, and which variants take it."""

import itertools

import pytest
import torch
from layers import mask_of

from raysearch.kernels import bitmap
from raysearch.kernels.weight import compress


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
