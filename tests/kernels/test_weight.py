"""One sparse weight: what was compressed comes back bit for bit, its bytes, and what it refuses."""

import re

import pytest
import torch
from layers import SHAPES, mask_of

from raysearch.kernels.weight import BLOCKS, SparseWeight, compress, detect_pattern, pack_bits

PATTERNS = [("unstructured", 1), ("2:4", 1), *(("block", block) for block in BLOCKS)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.1])  # nothing, some and everything pruned
def test_what_was_compressed_comes_back(pattern: tuple[str, int], shape: tuple[int, int], sparsity: float,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.kernels.weight.SLAB_ROWS", 64)  # several slabs, the last of them ragged
    torch.manual_seed(0)
    mask = mask_of(*pattern, shape, sparsity)
    values = torch.randn(shape)
    for dtype in (torch.float32, torch.bfloat16):
        weight = compress(values.to(dtype), mask, *pattern)
        exact = torch.where(mask, values.to(dtype), 0)
        assert torch.equal(weight.to_dense(), exact)
        assert torch.equal(weight.transposed().to_dense(), exact.T)
        doubled = weight.moved(lambda kept: kept * 2)
        assert torch.equal(doubled.to_dense(), exact * 2)


def test_bytes_and_density_by_hand() -> None:
    mask = torch.zeros(10, 12, dtype=torch.bool)
    mask[0, :3] = mask[9, 11] = True
    weight = compress(torch.ones(10, 12).bfloat16(), mask)
    assert (weight.num_bytes, weight.density) == (15 + 4 * 2, 4 / 120)  # 120 bits, 4 values of 2 bytes
    blocks = compress(torch.ones(64, 48), mask_of("block", 16, (64, 48), 0.0), "block", 16)
    assert (blocks.grid, blocks.num_bytes, blocks.density) == ((4, 3), 2 + 64 * 48 * 4, 1.0)


def test_bits_are_packed_least_significant_first() -> None:
    kept = torch.zeros(2, 5, dtype=torch.bool)
    kept[0, 0] = kept[0, 3] = kept[1, 4] = True
    assert pack_bits(kept).tolist() == [0b00001001, 0b00000010]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pattern_of_a_mask_is_found(pattern: tuple[str, int]) -> None:
    assert detect_pattern(mask_of(*pattern, (256, 384), 0.5)) == pattern


def test_a_mask_that_keeps_everything_has_no_pattern() -> None:
    assert detect_pattern(torch.ones(128, 128, dtype=torch.bool)) == ("unstructured", 1)


@pytest.mark.parametrize(("weight", "mask", "options", "sentence"), [
    (torch.ones(4), torch.ones(4, dtype=torch.bool), {}, "weight must be a non-empty floating point matrix, got torch.float32"),
    (torch.ones(0, 4), torch.ones(0, 4, dtype=torch.bool), {}, "weight must be a non-empty floating point matrix"),
    (torch.ones(4, 4).int(), torch.ones(4, 4, dtype=torch.bool), {}, "floating point matrix, got torch.int32"),
    (torch.ones(4, 4), torch.ones(4, 4), {}, "mask must be bool (4, 4) on cpu, got torch.float32 (4, 4)"),
    (torch.ones(4, 4), torch.ones(4, 8, dtype=torch.bool), {}, "mask must be bool (4, 4) on cpu, got torch.bool (4, 8)"),
    (torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool), {"pattern": "2:4"},
     "pattern 2:4 keeps at most 2 of 4 consecutive inputs; the mask keeps 4"),
    (torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool), {"pattern": "block"}, "pattern block needs a block of"),
    (torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool), {"block": 16}, "no other pattern has one; got 16 for unstructured"),
    (torch.ones(32, 32), torch.eye(32, dtype=torch.bool), {"pattern": "block", "block": 16}, "the mask cuts through one"),
    (torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool), {"pattern": "rows"}, "pattern must be one of unstructured, 2:4"),
])
def test_what_does_not_fit_is_refused(weight: torch.Tensor, mask: torch.Tensor, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        compress(weight, mask, **options)


def test_parts_that_contradict_each_other_are_refused() -> None:
    weight = compress(torch.ones(8, 8), torch.eye(8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bits must be uint8 of 8 bytes for a weight of \(8, 8\) in blocks of 1, got .*7"):
        SparseWeight((8, 8), "unstructured", 1, weight.bits[1:], weight.values)
    with pytest.raises(ValueError, match=r"values must be \(8, 1, 1\) for 8 kept blocks of 1, got \(7, 1, 1\)"):
        SparseWeight((8, 8), "unstructured", 1, weight.bits, weight.values[1:])
