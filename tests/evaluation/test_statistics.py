"""Values of a metric against lm-eval's in every bit, its standard errors against the bootstrap and by hand."""

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import pstdev, stdev
from typing import Any

import numpy as np
import pytest
from lm_eval.api.metrics import bits_per_byte, mean, median, perplexity, weighted_perplexity

from raysearch.evaluation.statistics import FORMS, aggregate, estimate, to_items
from raysearch.study.items import Items


def items_of(values: list[Any], aggregation: Callable[[Any], float]) -> Items:
    return to_items(values, FORMS[aggregation], range(len(values)), range(len(values)))


def random_values(num_draws: int) -> Iterator[tuple[list[Any], Callable[[Any], float]]]:
    """Values as lm-eval's tasks give them, of 1 to 3,000 items and many magnitudes."""
    random = np.random.default_rng(0)
    for draw in range(num_draws):
        num_items = int(random.integers(1, 3000 if draw % 20 == 0 else 50))
        nats = random.exponential(10 ** random.uniform(-2, 1.5), num_items)
        weights = random.integers(1, 2000, num_items).tolist()
        yield random.integers(0, 2, num_items).tolist(), mean
        yield [float(bit) for bit in random.integers(0, 2, num_items)], mean
        yield random.random(num_items).tolist(), mean
        yield (-nats).tolist(), perplexity
        yield list(zip((-nats * 10).tolist(), weights)), weighted_perplexity
        yield list(zip((-nats * 10).tolist(), weights)), bits_per_byte


def test_values_are_lm_evals_in_every_bit() -> None:
    for values, aggregation in random_values(200):
        assert estimate(items_of(values, aggregation), FORMS[aggregation])[0] == aggregation(values)


def test_items_by_hand() -> None:
    pairs = [(-3.0, 2), (-8.0, 4), (-1.0, 4)]
    items = to_items(pairs, FORMS[bits_per_byte], [2**64 - 1, 5, 5], [7, 0, 3])
    assert [values.tolist() for values in items] == [[3, 8, 1], [2, 4, 4], [2**64 - 1, 5, 5], [7, 0, 3]]
    bits, stderr = estimate(items, FORMS[bits_per_byte])
    assert bits == pytest.approx(1.2 / math.log(2), rel=1e-15)
    residuals = [3 - 1.2 * 2, 8 - 1.2 * 4, 1 - 1.2 * 4]
    assert stderr == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 10 / math.log(2), rel=1e-12)
    assert estimate(items, FORMS[weighted_perplexity])[0] == pytest.approx(math.exp(1.2), rel=1e-12)
    items = items_of([-1.0, -2.0, -4.5], perplexity)
    assert (items.numerator.tolist(), items.weight.tolist()) == ([1, 2, 4.5], [1, 1, 1])
    resampled = [math.exp(sum(draw) / 3) for draw in itertools.product([1, 2, 4.5], repeat=3)]  # all that there are
    assert estimate(items, FORMS[perplexity])[1] == pytest.approx(pstdev(resampled), rel=0.08)
    items = items_of([True, False, 1.0, 0], mean)
    assert (items.numerator.tolist(), items.weight.tolist()) == ([1, 0, 1, 0], [1] * 4)
    assert estimate(items, FORMS[mean]) == (0.5, pytest.approx(stdev([1, 0, 1, 0]) / 2, rel=1e-12))


def test_the_order_of_the_items_changes_a_sum_by_its_rounding_only() -> None:
    values = list(zip((-np.random.default_rng(0).exponential(3, 500)).tolist(), range(1, 501)))
    forwards, backwards = (estimate(items_of(each, bits_per_byte), FORMS[bits_per_byte]) for each in (values, values[::-1]))
    assert forwards == pytest.approx(backwards, rel=1e-12)


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
        if (form := FORMS.get(aggregation)) is not None:
            value, stderr = estimate(items_of(values, aggregation), form)
        else:
            value, stderr = aggregate(values, aggregation)
        assert value == pytest.approx(aggregation(values))
        assert stderr == pytest.approx(np.std(draws), rel=0.15)


@pytest.mark.parametrize(("num_items", "spread"), [(6, 0.5), (6, 1.2), (12, 1.5), (300, 0.5)])
def test_the_error_of_a_perplexity_on_few_items_is_that_of_its_items(num_items: int, spread: float) -> None:
    generator = np.random.default_rng(3)
    weights = generator.integers(40, 80, num_items)
    values = list(zip((-weights * generator.normal(3.5, spread, num_items)).tolist(), weights.tolist()))
    draws = [weighted_perplexity([values[i] for i in generator.integers(0, num_items, size=num_items)]) for _ in range(4000)]
    items = items_of(values, weighted_perplexity)
    value, stderr = estimate(items, FORMS[weighted_perplexity])
    assert stderr == pytest.approx(np.std(draws), rel=0.1)
    assert (value, stderr) == estimate(items, FORMS[weighted_perplexity])  # it is seeded
    error_of_logarithm = estimate(items, FORMS[bits_per_byte])[1] * math.log(2)
    if error_of_logarithm > 0.3:  # where the delta method is too small
        assert stderr > 1.05 * value * error_of_logarithm


def test_an_error_that_is_no_number_is_none() -> None:
    assert estimate(items_of([-690.0, -700.0, -720.0], perplexity), FORMS[perplexity])[1] is None


def test_one_item_has_no_standard_error() -> None:
    assert estimate(items_of([0.5], mean), FORMS[mean]) == (0.5, None)
    assert estimate(items_of([-2.0], perplexity), FORMS[perplexity]) == (math.exp(2), None)
    assert aggregate([0.5], median) == (0.5, None)


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    """lm-eval's would end with an OverflowError; `evaluate` says that the model diverged."""
    for values, aggregation in (([-2000.0, -1.0], perplexity), ([(-9000.0, 3), (-1.0, 2)], weighted_perplexity)):
        assert estimate(items_of(values, aggregation), FORMS[aggregation])[0] == math.inf
