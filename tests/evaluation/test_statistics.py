"""Standard errors and losses of a metric, against the bootstrap and by hand."""

from typing import Any

import numpy as np
import pytest
from lm_eval.api.metrics import bits_per_byte, mean, perplexity, weighted_perplexity

from raysearch.evaluation.statistics import summarise


def test_standard_errors_against_the_bootstrap() -> None:
    generator = np.random.default_rng(0)
    weights = generator.integers(50, 300, size=400)
    losses = weights * generator.normal(-1.5, 0.4, size=400)
    ratio_items = list(zip(losses.tolist(), weights.tolist()))
    cases: list[tuple[list[Any], Any]] = [
        (generator.integers(0, 2, size=400).tolist(), mean),
        (generator.normal(-2, 1, size=400).tolist(), perplexity),
        (ratio_items, weighted_perplexity), (ratio_items, bits_per_byte),
        (ratio_items, lambda rows: -sum(x for x, _ in rows) / sum(w for _, w in rows))]
    for values, aggregation in cases:
        draws = [aggregation([values[i] for i in generator.integers(0, 400, size=400)]) for _ in range(1500)]
        value, stderr, _ = summarise(values, aggregation)
        assert value == pytest.approx(aggregation(values))
        assert stderr == pytest.approx(np.std(draws), rel=0.15)
    assert summarise([0.5], mean)[1] is None
