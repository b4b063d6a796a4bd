"""Scores and the std threshold, against torch on whole tensors."""

import math

import pytest
import torch

from raysearch.pruning.criteria import magnitude_scores, moments, std_threshold


def test_magnitude_scores_keep_the_dtype() -> None:
    weight = torch.tensor([[-2.0, 0.5], [-0.0, 3.0]])
    scores = magnitude_scores(weight)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[2.0, 0.5], [0.0, 3.0]]


def test_std_threshold_over_shards_equals_the_whole_layer() -> None:
    weight = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.3
    shards = weight.flatten().tensor_split(3)
    total = sum((moments([shard]) for shard in shards), torch.zeros(3, dtype=torch.float64))
    assert total[2] == 3200
    threshold = std_threshold(0.7, *total.tolist())
    assert threshold == pytest.approx(0.7 * weight.double().std(correction=0).item(), rel=1e-10)


def test_std_threshold_of_equal_weights_is_zero() -> None:
    assert std_threshold(2.0, *moments([torch.full((1000,), 0.1)]).tolist()) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((-1.0, 0.0, 1.0, 2), "must be finite and at least 0, got -1"),
        ((math.nan, 0.0, 1.0, 2), "must be finite and at least 0, got nan"),
        ((1.0, 0.0, 0.0, 0), "needs at least one weight, got 0"),
        ((1.0, 0.0, math.inf, 2), "needs finite weights, got a sum of squares of inf"),
    ],
)
def test_std_threshold_refuses(arguments: tuple[float, float, float, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        std_threshold(*arguments)
