"""How sure a study's numbers are: its items are resampled once for all candidates, and everything is taken from that draw.

Legend: k candidates, n items that were cut from g clusters (documents; most items are their own), b draws;
r = sum(numerator) / sum(weight) of a candidate, from which its metric is computed (study.items.Form).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from raysearch.config import higher_is_better
from raysearch.pruning.pareto import Bools, Floats, hypervolume, non_dominated, pareto_front
from raysearch.study.items import Items, form_of, read_items
from raysearch.study.ledger import Ledger, Split
from raysearch.study.storage import AnyPath

NUM_DRAWS = 1000
"""The 5th percentile is then known to 0.7 percentage points."""
ROUNDING = 10
"""Decimals of r: what lies behind is the order in which sums were taken, and must make no tie a difference."""
MIN_CLUSTERS = 4
"""With fewer Student's t has no standard deviation."""
MISMATCH = 1e-6
"""Relative: items whose metric is this far from the recorded one were summed up in a way that its name does not say."""


class Draws(NamedTuple):
    """What a metric of k candidates could as well have been on other items."""

    metric: str
    value: Floats
    """[k], on all items."""
    drawn: Floats
    """[b, k]; column by column on the same resampled items, so that differences are paired."""
    numerator: Floats
    """[n, k], by item."""
    num_clusters: int

    @property
    def stderr(self) -> Floats:
        return np.asarray(self.drawn.std(axis=0), dtype=np.float64)


def resample(metric: str, items: Sequence[Items], num_draws: int = NUM_DRAWS, seed: int = 0) -> Draws:
    """Bootstrap over clusters (Davison and Hinkley 1997, section 3.8) as one product, counts [b, g] @ sums [g, k], so
    O(b (n + g k)). Equal clusters are drawn equally for every metric.

    Differs in that a draw's distance from the value is scaled by sqrt(g / chi2(g - 1)), one chi2 a draw: quantiles are then
    those of Student's t with g - 1 degrees of freedom and not too narrow where documents are few. ValueError for fewer
    than MIN_CLUSTERS, or candidates that were scored on different items."""
    if not items:
        raise ValueError(f"{metric} needs candidates with items, got none")
    items = [each.in_task_order() for each in items]
    first = items[0]
    for each in items[1:]:
        if any(not np.array_equal(one, other) for one, other in zip(each[1:], first[1:])):
            raise ValueError(f"{metric} must be of the same items to be compared, got {len(each.item)} that are not the same "
                             f"as the other {len(first.item)}")
    numerator = np.stack([each.numerator for each in items], axis=1)
    clusters, of_item = np.unique(first.cluster, return_inverse=True)
    num_clusters, form = len(clusters), form_of(metric)
    if num_clusters < MIN_CLUSTERS:
        raise ValueError(f"{metric} needs items of at least {MIN_CLUSTERS} documents for an error, got those of {num_clusters}")
    by_cluster = np.argsort(of_item, kind="stable")
    sums = np.add.reduceat(np.column_stack([numerator, first.weight])[by_cluster],
                           np.searchsorted(of_item[by_cluster], np.arange(num_clusters)), axis=0)  # [g, k + 1]
    generator = np.random.default_rng(seed)
    picked = generator.integers(0, num_clusters, (num_draws, num_clusters)) + num_clusters * np.arange(num_draws)[:, None]
    counts = np.bincount(picked.ravel(), minlength=num_draws * num_clusters).reshape(num_draws, num_clusters)
    totals = counts.astype(np.float64) @ sums
    ratio = sums[:, :-1].sum(axis=0) / sums[:, -1].sum()
    scale = np.sqrt(num_clusters / generator.chisquare(num_clusters - 1, num_draws))[:, None]
    drawn = (ratio + (totals[:, :-1] / totals[:, -1:] - ratio) * scale).round(ROUNDING)
    return Draws(metric, form.value(ratio.round(ROUNDING)), form.value(drawn), numerator, num_clusters)


def whole_items(directory: str, recorded: pd.DataFrame, split: Split) -> dict[str, dict[str, Items]]:
    """By metric and key, for `recorded` (keys x metrics, their values): of those candidates whose items on `split` are there
    and give that value, so without raced and damaged ones and metrics that are not made of sums."""
    ledger = Ledger.open(directory)
    found: dict[str, dict[str, Items]] = {str(metric): {} for metric in recorded}
    for key, values in recorded.iterrows():
        try:
            path = ledger.items_path(str(key), split)
            items = _read(path, path.stat().st_mtime)
        except (ValueError, FileNotFoundError):  # damaged: a command warns of it, and the rest is shown
            continue
        for metric, value in values.items():
            if (of_metric := items.get(str(metric))) is not None:
                ratio = of_metric.numerator.sum() / of_metric.weight.sum()
                if np.isclose(form_of(str(metric)).value(ratio), value, MISMATCH, 0):
                    found[str(metric)][str(key)] = of_metric
    return found


@functools.lru_cache(maxsize=512)
def _read(path: AnyPath, changed: float) -> dict[str, Items]:
    """A page asks for the same ones several times."""
    return read_items(path)


def paired(draws: Draws, one: int, other: int) -> tuple[float, Floats]:
    """(value of `one` - that of `other`, its draws [b]).

    Where both are right or wrong on each item, an item is added on which only the one is right and another on which only the
    other is (after Agresti and Min 2005, who add halves), or two models without a difference on few items would differ by 0
    for certain. It adds noise of sqrt(2) / n and moves nothing."""
    drawn = draws.drawn[:, one] - draws.drawn[:, other]
    if is_binary(draws):
        noise = np.random.default_rng(1).standard_normal(len(drawn))
        drawn = drawn + noise * 2**0.5 / len(draws.numerator)
    return float(draws.value[one] - draws.value[other]), drawn


def fixed_sequence(size: npt.ArrayLike, safety: npt.ArrayLike, certain: npt.ArrayLike) -> tuple[list[int], int | None]:
    """([those that pass, largest first], the first that does not): tests one candidate after the other, from the largest and
    safest to the smallest, until one fails; [k] each. Those that are neither smaller nor safer than another are left out.

    The order comes from `size` and `safety` (of the selection split), which know nothing of the items behind `certain` (of the
    report split). So tests that err with probability 1 - c each let a candidate that breaks its limit pass with at most 1 - c,
    however many there are and although the smallest is picked (fixed-sequence testing, Maurer, Hothorn and Lehmacher 1995)."""
    sizes, passes = np.asarray(size, dtype=np.float64), np.asarray(certain, dtype=bool)
    safe = np.nan_to_num(np.asarray(safety, dtype=np.float64))
    on_front = pareto_front(sizes, safe)
    order = [int(i) for i in np.lexsort((safe, -sizes)) if on_front[i]]
    number = next((number for number, i in enumerate(order) if not passes[i]), len(order))
    return order[:number], order[number] if number < len(order) else None


def is_binary(draws: Draws) -> bool:
    """Whether an item is right or wrong, as for accuracies."""
    return higher_is_better(draws.metric) and bool(np.isin(draws.numerator, (0, 1)).all())


def band(draws: Draws, level: float = 0.95) -> tuple[Floats, Floats]:
    """(low [k], high [k]) that hold all k true values at once with probability `level`: each value plus and minus its standard
    error times the quantile of the largest |draw - value| / standard error of a draw (max-t; Romano and Wolf 2005)."""
    stderr = draws.stderr
    distance = np.abs(draws.drawn - draws.value) / np.where(stderr > 0, stderr, np.inf)
    reach = np.quantile(distance.max(axis=1), level) * stderr
    return draws.value - reach, draws.value + reach


def frontier_band(size: npt.ArrayLike, draws: Draws, level: float = 0.95) -> tuple[Floats, Floats]:
    """(low [k], high [k]): the best true quality, higher is better, that the candidates no larger than each one have; all at
    once with at least probability `level`, for it is the running best of `band`'s ends."""
    sizes = np.asarray(size, dtype=np.float64)
    low, high = band(draws, level)
    if not higher_is_better(draws.metric):
        low, high = -high, -low
    no_larger = np.searchsorted(np.sort(sizes), sizes, side="right") - 1  # the last of the equal ones
    order = np.argsort(sizes, kind="stable")
    return np.maximum.accumulate(low[order])[no_larger], np.maximum.accumulate(high[order])[no_larger]


def hypervolume_interval(size: npt.ArrayLike, quality: npt.ArrayLike, drawn: Floats, reference: tuple[float, float],
                         level: float = 0.95) -> tuple[float, float]:
    """(low, high) of pareto.hypervolume: [k], [k] and draws [b, k], higher is better. The basic bootstrap interval (Davison and
    Hinkley 1997, eq. 5.6), whose ends turn the draws around: the best of many noisy values is too good, again in each draw."""
    sizes, qualities = np.asarray(size, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    value, *areas = [hypervolume(np.column_stack([sizes, one]), (False, True), reference) for one in [qualities, *drawn]]
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return float(2 * value - high), float(2 * value - low)


def front_share(drawn: Floats, maximised: Sequence[bool]) -> Floats:
    """Share of the draws in which each candidate is non-dominated: [b, k, d objectives] -> [k]; sizes are the same in each
    draw."""
    on_front: list[Bools] = [non_dominated(values, maximised) for values in drawn]
    return np.asarray(np.mean(on_front, axis=0), dtype=np.float64)
