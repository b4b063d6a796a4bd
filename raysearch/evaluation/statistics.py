"""A metric's items, and its value and standard error from them, for each of lm-eval's ways to aggregate.

Legend: x_i = numerator of item i, w_i = its weight, n = items, m = mean.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api import metrics as lm_eval_metrics
from numpy.typing import ArrayLike, NDArray

from raysearch.study.items import BITS, MEAN, PERPLEXITY, Form, Items

LARGEST_EXPONENT = math.log(sys.float_info.max)
NUM_BOOTSTRAPS = 1000
"""The error of the error is then 2 %."""
JACKKNIFE_GROUPS = 100
"""Each is one more aggregation over nearly all items, so not one group per item."""


class Aggregation(NamedTuple):
    """How lm-eval's values become items, and these a metric."""

    sign: int
    """Of lm-eval's values: -1 where they are log-probabilities, so that x is nats of loss."""
    is_weighted: bool
    """lm-eval's values are pairs, the second of which is w (bytes, words or tokens); else w = 1."""
    form: Form


FORMS: dict[Callable[..., float], Aggregation] = {
    lm_eval_metrics.mean: Aggregation(1, False, MEAN),
    lm_eval_metrics.perplexity: Aggregation(-1, False, PERPLEXITY),
    lm_eval_metrics.weighted_perplexity: Aggregation(-1, True, PERPLEXITY),
    lm_eval_metrics.bits_per_byte: Aggregation(-1, True, BITS),
}
"""By lm-eval's aggregation; one that is not here is not made of sums over items."""


def to_items(values: Sequence[Any], aggregation: Aggregation, cluster: ArrayLike, item: ArrayLike) -> Items:
    """lm-eval's values of one metric [n], with the cluster and the index of each item [n]."""
    numbers = np.array(values, dtype=float)  # [n, 2] or [n]
    x, weight = numbers.T if aggregation.is_weighted else (numbers, np.ones(len(numbers)))
    return Items(aggregation.sign * x, weight, np.asarray(cluster, np.uint64), np.asarray(item, np.int64))


def estimate(items: Items, aggregation: Aggregation) -> tuple[float, float | None]:
    """(value, standard error over the items), the value in every bit as lm-eval's aggregation gives it.

    Means have lm-eval's standard error, s / sqrt(n). A ratio R = sum(x) / sum(w), as in bits per byte, has
    sqrt(n / (n - 1) * sum((x_i - R * w_i)^2)) / sum(w) (linearisation, Cochran 1977, eq. 2.39). An exponential of either has
    that of NUM_BOOTSTRAPS seeded bootstrap samples of the items, as in lm-eval: exp(R) times the error of R (delta method) is
    too small on few items, 10.3 where they give 13.4. None for a single item, and where it is no number.
    """
    form = aggregation.form
    value = sum(items.numerator.tolist()) / sum(items.weight.tolist()) / form.unit  # lm-eval's sums: Python's, in this order
    spread = x = items.numerator / form.unit
    if aggregation.is_weighted:
        spread = (x - x.sum() / items.weight.sum() * items.weight) / items.weight.mean()
    stderr = float(np.std(spread, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    if form.is_exponential:
        value = math.exp(value) if value < LARGEST_EXPONENT else math.inf
        stderr = _bootstrap(x, items.weight) if len(x) > 1 else None
    return value, stderr


def _bootstrap(x: NDArray[np.float64], weight: NDArray[np.float64]) -> float | None:
    """Standard deviation of exp(sum(x) / sum(w)) over samples of the n items with replacement; in O(NUM_BOOTSTRAPS * n)."""
    generator, logarithms = np.random.default_rng(0), np.empty(NUM_BOOTSTRAPS)
    for number in range(NUM_BOOTSTRAPS):
        drawn = generator.integers(0, len(x), len(x), dtype=np.int32)
        logarithms[number] = x[drawn].sum() / weight[drawn].sum()
    with np.errstate(over="ignore", invalid="ignore"):
        stderr = float(np.std(np.exp(logarithms), ddof=1))
    return stderr if math.isfinite(stderr) else None


def aggregate(values: Sequence[Any], aggregation: Callable[[Any], float]) -> tuple[float, float | None]:
    """(value, standard error) of a metric that has no form: lm-eval's, and the delete-one-group jackknife's, None of one
    item."""
    value, groups = float(aggregation(values)), min(JACKKNIFE_GROUPS, len(values))
    if groups < 2:
        return value, None
    without = [float(aggregation([x for i, x in enumerate(values) if i % groups != group])) for group in range(groups)]
    return value, float(math.sqrt((groups - 1) * np.var(without)))
