"""The GPU's passes of exact selection against torch's."""

import pytest
import torch
from torch import Tensor

from raysearch.kernels import selection_passes
from raysearch.pruning.selection import MAGNITUDES, SCORES, Passes, keep_masks


def hard_shards() -> list[Tensor]:
    """Pruned weights, masters of bf16 weights, an empty shard, one that is not aligned, denormals and infinities, bf16."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(1_000_000, generator=generator) * 0.02
    weights[::3] = 0.0
    weights[1::3] = weights[1::3].bfloat16().float()
    return [weights[:600_000], weights[:0], weights[600_001:], torch.tensor([1e-45, -3e-39, torch.inf, -torch.inf, -0.0]),
            torch.randn(5_000, generator=generator).bfloat16()]


def test_without_a_gpu_torch_does_it() -> None:
    assert all(selection_passes(passes, torch.device("cpu")) is passes for passes in (MAGNITUDES, SCORES))


@pytest.mark.gpu
@pytest.mark.parametrize("of_torch", [MAGNITUDES, SCORES])
def test_masks_on_a_gpu_are_those_of_the_cpu(of_torch: Passes) -> None:
    shards = hard_shards() if of_torch is MAGNITUDES else [shard.float() for shard in hard_shards()]
    on_gpu = [shard.cuda() for shard in shards]
    on_gpu[2] = torch.cat([shards[2][:1], shards[2]]).cuda()[1:]  # an address that 16 does not divide
    passes = selection_passes(of_torch, on_gpu[0].device)
    assert passes is not of_torch
    num_weights = sum(shard.numel() for shard in shards)
    for low_bit, width, prefix in ((20, 11, 0), (0, 10, 0), (15, 16 - 5, 0x3C), (10, 10, 0x3CA), (10, 11, 0x5E5)):
        prefixes = [prefix, 0, prefix, prefix, 0]
        wanted = of_torch.counts(shards, low_bit, width, prefixes)
        assert torch.equal(passes.counts(on_gpu, low_bit, width, prefixes).cpu(), wanted)
    for num_prune in (0, 1, 250_000, 600_001, 601_234, num_weights):
        wanted = keep_masks(shards, range(5), num_prune, passes=of_torch)
        masks = keep_masks(on_gpu, range(5), num_prune, passes=passes)
        assert sum(int((~mask).sum()) for mask in masks) == num_prune
        assert all(torch.equal(a.cpu(), b) for a, b in zip(masks, wanted, strict=True))
