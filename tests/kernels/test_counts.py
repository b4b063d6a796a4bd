"""The histogram kernel against `pruning.selection`'s, through Triton's interpreter in a process of its own, and on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raysearch.pruning import selection


def hard_pieces() -> list[Tensor]:
    """Pruned weights, masters of bf16 weights, denormals, infinities, an empty piece, one of a single weight."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(9_000, generator=generator) * 0.02
    weights[::3] = 0.0
    weights[1::3] = weights[1::3].bfloat16().float()
    return [weights, weights[:0], torch.tensor([-0.5]), torch.tensor([1e-45, -3e-39, torch.inf, -torch.inf, -0.0]),
            torch.randn(5_000, generator=generator).bfloat16()]


def assert_same_counts(pieces: list[Tensor]) -> None:
    from raysearch.kernels.counts import magnitude_counts

    top = int(torch.tensor(0.02).bfloat16().float().view(torch.int32)) >> 15
    for low_bit, num_bins, prefix in ((15, 1 << 16, 0), (0, 1 << 15, top), (0, 1 << 15, 0)):
        wanted = selection.magnitude_counts([piece.cpu() for piece in pieces], low_bit, num_bins, prefix)
        assert torch.equal(magnitude_counts(pieces, low_bit, num_bins, prefix).cpu(), wanted)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_counts_in_the_interpreter() -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    script = "from test_counts import *; assert_same_counts(hard_pieces()); print('all right')"
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=250)
    assert run.stdout.strip() == "all right", run.stderr[-3000:]


@pytest.mark.gpu
def test_masks_on_a_gpu_are_those_of_the_cpu() -> None:
    from raysearch.kernels.counts import magnitude_counts

    assert_same_counts([piece.cuda() for piece in hard_pieces()])
    weights = torch.randn(1 << 23, generator=torch.Generator().manual_seed(5)) * 0.02
    weights[::2] = weights[::2].bfloat16().float()
    pieces = [weights[:1000], weights[1000:]]
    for num_prune in (0, 1, 5_000_001, 1 << 23):
        wanted = selection.keep_masks(pieces, [0, 1], num_prune)
        masks = selection.keep_masks([piece.cuda() for piece in pieces], [0, 1], num_prune, counts=magnitude_counts)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(masks, wanted, strict=True))
