"""The decode kernel's layout holds the weight."""

import pytest
import torch
from layers import mask_of

from raysearch.kernels import decode
from raysearch.kernels.weight import compress


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
