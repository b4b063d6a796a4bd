"""Value, standard error and per-item contributions of a metric, for each of lm-eval's ways to aggregate.

Legend: x_i = value of item i, w_i = its weight (bytes, words or tokens), n = items, m = mean.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api import metrics as lm_eval_metrics

JACKKNIFE_GROUPS = 100
"""Each is one more aggregation over nearly all items, so not one group per item."""


def summarise(values: Sequence[Any], aggregation: Callable[[Any], float]) -> tuple[float, float | None, list[float]]:
    """(value, standard error over the items, contributions whose mean is the value; for perplexities, its logarithm).

    The value is lm-eval's. Means have lm-eval's standard error, s / sqrt(n). exp(-m(x)) has exp(-m) * s / sqrt(n)
    (delta method, where lm-eval draws bootstrap samples). A ratio R = sum(x) / sum(w), as in bits per byte, has
    sqrt(n / (n - 1) * sum((x_i - R * w_i)^2)) / sum(w) (linearisation, Cochran 1977, eq. 2.39), its exponential
    exp(-R) times that. Any other aggregation: the delete-one-group jackknife. None for a single item.
    Contributions x_i / m(w) make paired comparisons of two models exact, because the weights are theirs both.
    """
    value = float(aggregation(values))
    if aggregation is lm_eval_metrics.mean:
        contributions = [float(x) for x in values]
        return value, _stderr(contributions), contributions
    if aggregation is lm_eval_metrics.perplexity:
        contributions = [-float(x) for x in values]
        return value, _times(value, _stderr(contributions)), contributions
    if aggregation in (lm_eval_metrics.weighted_perplexity, lm_eval_metrics.bits_per_byte):
        losses, weights = -np.array(values, dtype=float).T
        weights = -weights
        if aggregation is lm_eval_metrics.bits_per_byte:
            losses = losses / math.log(2)
        ratio = losses.sum() / weights.sum()
        stderr = _stderr(list((losses - ratio * weights) / weights.mean()))
        if aggregation is lm_eval_metrics.weighted_perplexity:
            stderr = _times(value, stderr)
        return value, stderr, list(losses / weights.mean())
    return value, _jackknife(values, aggregation), [float(x) for x in values if isinstance(x, (int, float))]


def losses(values: Sequence[Any], aggregation: Callable[[Any], float], higher_is_better: bool) -> list[float]:
    """Per item, a number of 0 or more whose sum orders models on equal items as the metric does, lower is better:
    nats of a perplexity, 1 - x of an accuracy. ValueError where a metric is no mean over its items."""
    if aggregation in (lm_eval_metrics.weighted_perplexity, lm_eval_metrics.bits_per_byte):
        return [-float(x) for x, _ in values]
    if aggregation is lm_eval_metrics.perplexity:
        return [-float(x) for x in values]
    if aggregation is not lm_eval_metrics.mean:
        raise ValueError(f"racing needs a metric that is a mean over items, got the aggregation {aggregation}")
    return [1 - float(x) if higher_is_better else float(x) for x in values]


def _stderr(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _times(factor: float, stderr: float | None) -> float | None:
    return None if stderr is None else factor * stderr


def _jackknife(values: Sequence[Any], aggregation: Callable[[Any], float]) -> float | None:
    groups = min(JACKKNIFE_GROUPS, len(values))
    if groups < 2:
        return None
    without = [float(aggregation([x for i, x in enumerate(values) if i % groups != group])) for group in range(groups)]
    return float(math.sqrt((groups - 1) * np.var(without)))
