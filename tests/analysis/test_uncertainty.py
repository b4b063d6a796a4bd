"""One resampling of the items: against formulas, against itself in another order, and on simulated studies of known truth."""

import math
import time
from statistics import NormalDist

import numpy as np
import pytest

from analysis.uncertainty import band, fixed_sequence, front_share, frontier_band, hypervolume_interval, paired, resample
from raysearch.pruning.pareto import hypervolume
from raysearch.study.items import Items


def scored(numerator: np.ndarray, weight: np.ndarray | None = None, cluster: np.ndarray | None = None) -> list[Items]:
    """[n, k] -> items of k candidates."""
    n = np.arange(len(numerator))
    weight, cluster = np.ones(len(n)) if weight is None else weight, n if cluster is None else cluster
    return [Items(column, weight, cluster.astype(np.uint64), n) for column in numerator.T.astype(float)]


def test_errors_of_a_mean_a_ratio_and_an_exponential() -> None:
    random = np.random.default_rng(0)
    x = random.exponential(3, (400, 2)) + random.exponential(3, 400)[:, None]
    accuracy = resample("task/acc", scored(x < 4), num_draws=4000)
    assert accuracy.value == pytest.approx((x < 4).mean(axis=0))
    assert accuracy.stderr == pytest.approx((x < 4).std(axis=0, ddof=1) / 20, rel=0.05)
    weight = random.integers(50, 300, 400).astype(float)
    bits = resample("text/bits_per_byte", scored(x * weight[:, None], weight), num_draws=4000)
    ratio = (x * weight[:, None]).sum(axis=0) / weight.sum()
    assert bits.value == pytest.approx(ratio / math.log(2))
    linear = ((x - ratio) * weight[:, None] / weight.mean()).std(axis=0, ddof=1) / 20 / math.log(2)  # Cochran 1977, eq. 2.39
    assert bits.stderr == pytest.approx(linear, rel=0.06)
    perplexity = resample("task/perplexity", scored(x / 10), num_draws=4000)
    assert perplexity.value == pytest.approx(np.exp(x.mean(axis=0) / 10))
    assert perplexity.stderr == pytest.approx(perplexity.value * x.std(axis=0) / 200, rel=0.05)
    difference, drawn = paired(bits, 0, 1)
    assert difference == pytest.approx(bits.value[0] - bits.value[1])
    assert drawn.std() < 0.8 * math.hypot(*bits.stderr)


def test_pieces_of_one_document_count_once() -> None:
    random = np.random.default_rng(1)
    of_document = random.standard_normal(40)
    pieces = resample("text/acc", scored(np.repeat(of_document, 10)[:, None], cluster=np.repeat(np.arange(40), 10)))
    whole = resample("text/acc", scored(of_document[:, None]))
    assert pieces.stderr == pytest.approx(whole.stderr)
    assert pieces.num_clusters == 40


def test_few_documents_have_students_errors() -> None:
    low, high = np.quantile(resample("a/acc", scored(np.arange(5)[:, None]), num_draws=20_000).drawn, [0.025, 0.975])
    assert (high - low) / 2 == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=0.1)  # t with 4 degrees of freedom


def test_the_order_of_items_and_equal_candidates_change_nothing() -> None:
    numerator = np.random.default_rng(2).exponential(1, (301, 40))
    numerator[:, 1:] = numerator[:, :1]
    items = scored(numerator)
    shuffled = [Items(*(values[order] for values in each)) for each in items
                for order in [np.random.default_rng(len(each.item)).permutation(301)]]
    draws = resample("a/perplexity", shuffled)
    assert (draws.drawn == resample("a/perplexity", items).drawn).all()
    assert (draws.drawn == draws.drawn[:, :1]).all()
    size = np.broadcast_to(np.r_[1.0, 1.0, np.arange(2, 40)], draws.drawn.shape)
    assert front_share(np.stack([size, draws.drawn], axis=2), [False, False]).tolist() == [1.0, 1.0] + [0.0] * 38


def test_what_cannot_be_resampled() -> None:
    numerator = np.ones((4, 2))
    one, other = scored(numerator)
    with pytest.raises(ValueError, match=r"a/acc must be of the same items to be compared, got 3 that are not .* other 4"):
        resample("a/acc", [one, Items(*(values[:3] for values in other))])
    with pytest.raises(ValueError, match="same items"):
        resample("a/acc", [one, other._replace(cluster=other.cluster + 1)])
    with pytest.raises(ValueError, match="a/acc needs items of at least 4 documents for an error, got those of 1"):
        resample("a/acc", scored(numerator, cluster=np.zeros(4)))
    with pytest.raises(ValueError, match="a/acc needs candidates with items, got none"):
        resample("a/acc", [])


def test_models_that_agree_on_few_items_do_not_differ_by_0_for_certain() -> None:
    draws = resample("a/acc", scored(np.ones((50, 2))))
    difference, drawn = paired(draws, 0, 1)
    assert difference == 0.0
    assert np.quantile(drawn, 0.05) == pytest.approx(-1.645 * math.sqrt(2) / 50, rel=0.15)


def test_share_on_the_frontier_by_hand() -> None:
    draws = np.array([[[1, 5], [2, 4], [3, 6]], [[1, 5], [2, 6], [3, 6]], [[1, 5], [2, 5], [3, 7]]], float)
    assert front_share(draws, [False, True]) == pytest.approx([1, 1 / 3, 2 / 3])


def test_the_order_of_tests_is_that_of_the_other_split() -> None:
    size, safety = [10, 8, 6, 4, 2, 9], [9.0, 7.0, 5.0, 1.0, -3.0, 2.0]  # the last is larger and less safe than another
    assert fixed_sequence(size, safety, [True] * 6) == ([0, 1, 2, 3, 4], None)
    assert fixed_sequence(size, safety, [True, True, False, True, True, False]) == ([0, 1], 2)
    assert fixed_sequence(size, safety, [False, True, True, True, True, True]) == ([], 0)
    assert fixed_sequence([1, 1, 2], [3.0, 3.0, math.inf], [True, True, True]) == ([2, 0, 1], None)
    assert fixed_sequence([], [], []) == ([], None)


def test_a_hypervolume_that_noise_makes_too_good() -> None:
    draws = resample("a/acc", scored(np.random.default_rng(5).random((400, 12)) < 0.5))
    size = np.linspace(0.1, 0.9, 12)
    low, high = hypervolume_interval(size, draws.value, draws.drawn, (1.0, 0.0))
    assert low < 0.9 * 0.5 < high  # the truth
    assert (low + high) / 2 < hypervolume(np.column_stack([size, draws.value]), (False, True), (1.0, 0.0))


def test_bands_hold_all_true_values_at_once() -> None:
    random, normal = np.random.default_rng(3), NormalDist()
    truth = np.array([0.35, 0.5, 0.5, 0.62])
    cut, size = np.array([normal.inv_cdf(p) for p in truth]), np.array([1.0, 2, 3, 3])
    held = np.zeros(2)
    for _ in range(150):
        right = 0.9 * random.standard_normal((400, 1)) + math.sqrt(0.19) * random.standard_normal((400, 4)) < cut
        draws = resample("a/acc", scored(right), num_draws=400)
        low, high = band(draws)
        held[0] += ((low <= truth) & (truth <= high)).all()
        low, high = frontier_band(size, draws)
        best = np.array([0.35, 0.5, 0.62, 0.62])
        held[1] += ((low <= best) & (best <= high)).all()
    assert (held / 150 >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 150)).all()
    assert held[0] / 150 <= 0.99


def test_200_candidates_of_5000_items_take_seconds() -> None:
    numerator = np.random.default_rng(4).exponential(1, (5000, 200))
    began = time.process_time()
    band(resample("a/perplexity", scored(numerator)))
    assert time.process_time() - began < 5
