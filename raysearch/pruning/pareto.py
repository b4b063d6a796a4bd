"""Pareto mathematics: which candidates no other one beats, in any number of objectives, and areas for two.

Arrays only. n = number of candidates, d = number of objectives. Where there are two they are size, which goes down, and
quality, which goes up; a quality where lower is better (perplexity) comes in with its sign changed.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def pareto_front(size: npt.ArrayLike, quality: npt.ArrayLike) -> Bools:
    """Which candidates no other one dominates: (n,), (n,) -> (n,) bool, in O(n log n).

    j dominates i when size[j] <= size[i] and quality[j] >= quality[i] and one of the two is strict. So equal points
    are on the front together or not at all (drop aliases first if one of them is enough). A point with a NaN or an
    infinity is never on the front and dominates nothing."""
    sizes, qualities = _pair(size, quality)
    front = np.isfinite(sizes) & np.isfinite(qualities)
    finite = np.flatnonzero(front)
    order = finite[np.lexsort((-qualities[finite], sizes[finite]))]  # by size up, then quality down
    s, q = sizes[order], qualities[order]
    starts = np.append(True, s[1:] > s[:-1])[:len(s)]  # first, and so best, of each size
    best = np.maximum.accumulate(np.where(starts, np.arange(len(s)), 0))
    improves = q > np.append(-np.inf, np.maximum.accumulate(q))[:len(s)]
    front[order] = improves[best] & (q == q[best])
    return front


def non_dominated(values: npt.ArrayLike, maximised: Sequence[bool]) -> Bools:
    """Which candidates no other one dominates: (n, d) -> (n,) bool; `maximised` says of each objective whether it goes up.

    j dominates i when it is at least as good in every objective and better in one, so equal points are on the front together
    or not at all. A point with a NaN or an infinity is never on the front and dominates nothing. O(n log n) for two
    objectives of which one goes down and one up, else O(n^2 d)."""
    return np.asarray(non_dominated_ranks(values, maximised, max_ranks=1) == 0, dtype=np.bool_)


def non_dominated_ranks(values: npt.ArrayLike, maximised: Sequence[bool], max_ranks: int | None = None
                        ) -> npt.NDArray[np.int64]:
    """Non-dominated sorting (Deb et al. 2002, NSGA-II, section III A): 0 on the front, 1 on the front of the others, and so
    on; -1 for points that are not finite, and for those behind the first `max_ranks` fronts. (n, d) -> (n,)."""
    points = np.asarray(values, dtype=np.float64)
    points = points.reshape(len(points), len(maximised))
    ranks = np.full(len(points), -1, dtype=np.int64)
    left = np.flatnonzero(np.isfinite(points).all(axis=1))
    lower = np.where(np.asarray(maximised, dtype=bool), -points, points)  # lower is better in every column
    rank = 0
    while len(left) and (max_ranks is None or rank < max_ranks):
        front = _front(lower[left])
        ranks[left[front]] = rank
        left, rank = left[~front], rank + 1
    return ranks


def _front(lower: Floats) -> Bools:
    """Of finite points, lower is better: (n, d) -> (n,)."""
    if lower.shape[1] == 2:
        return pareto_front(lower[:, 0], -lower[:, 1])
    front = np.empty(len(lower), dtype=bool)
    for index, point in enumerate(lower):  # a row at a time: n x d numbers are held, not n x n x d
        front[index] = not ((lower <= point).all(axis=1) & (lower < point).any(axis=1)).any()
    return front


def hypervolume(size: npt.ArrayLike, quality: npt.ArrayLike, reference: tuple[float, float]) -> float:
    """Area dominated by the points and bounded by `reference` = (worst size, worst quality); exact in two dimensions
    (Zitzler & Thiele 1999). Points that do not beat the reference in both numbers, and NaN, add nothing."""
    sizes, qualities = _pair(size, quality)
    worst_size, worst_quality = reference
    inside = (sizes < worst_size) & (qualities > worst_quality)
    inside[inside] = pareto_front(sizes[inside], qualities[inside])
    order = np.argsort(sizes[inside])
    front_sizes, front_qualities = sizes[inside][order], qualities[inside][order]  # both rise along the front
    widths = np.diff(np.append(front_sizes, worst_size))
    return float(np.sum(widths * (front_qualities - worst_quality)))


def _pair(size: npt.ArrayLike, quality: npt.ArrayLike) -> tuple[Floats, Floats]:
    sizes, qualities = np.asarray(size, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    if sizes.ndim != 1 or sizes.shape != qualities.shape:
        raise ValueError("size and quality must be two one-dimensional arrays of equal length, "
                         f"got shapes {sizes.shape} and {qualities.shape}")
    return sizes, qualities
