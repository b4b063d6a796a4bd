"""Pareto mathematics: which candidates no other one beats, in any number of objectives, the volume they dominate, the knee.

Arrays only. n = number of candidates, d = number of objectives. `pareto_front` is of size, which goes down, and quality, which
goes up; a quality where lower is better (perplexity) comes in with its sign changed.
"""

import bisect
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
    sizes, qualities = np.asarray(size, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    if sizes.ndim != 1 or sizes.shape != qualities.shape:
        raise ValueError("size and quality must be two one-dimensional arrays of equal length, "
                         f"got shapes {sizes.shape} and {qualities.shape}")
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
    and three objectives, else O(n d) for each point of the front."""
    points = np.asarray(values, dtype=np.float64)
    points = points.reshape(len(points), len(maximised))
    lower = np.where(np.asarray(maximised, dtype=bool), -points, points)  # lower is better in every column
    front: Bools = np.asarray(np.isfinite(points).all(axis=1), dtype=np.bool_)
    front[front] = _front(lower[front])
    return front


def _front(lower: Floats) -> Bools:
    """Of finite points, lower is better: (n, d) -> (n,)."""
    if lower.shape[1] == 2:
        return pareto_front(lower[:, 0], -lower[:, 1])
    order = np.lexsort(lower.T[::-1])  # no point is dominated by a later one
    points = lower[order]
    starts = np.append(True, (points[1:] != points[:-1]).any(axis=1))[:len(points)]  # of equal points
    distinct = points[starts]
    on_front = _front_of_three(distinct) if lower.shape[1] == 3 else _front_by_peeling(distinct)
    front = np.empty(len(lower), dtype=np.bool_)
    front[order] = on_front[np.cumsum(starts) - 1]
    return front


def _front_of_three(points: Floats) -> Bools:
    """Of distinct points in lexicographic order (n, 3), in O(n log n) comparisons: a sweep along the first objective over the
    staircase of the other two (Kung, Luccio and Preparata 1975)."""
    front = np.ones(len(points), dtype=np.bool_)
    second: list[float] = []  # of the staircase: this one rises, the third falls
    third: list[float] = []
    for index, (_, y, z) in enumerate(points.tolist()):
        place = bisect.bisect_right(second, y)
        if place and third[place - 1] <= z:
            front[index] = False
            continue
        start = place - 1 if place and second[place - 1] == y else place
        end = start
        while end < len(third) and third[end] >= z:
            end += 1
        second[start:end], third[start:end] = [y], [z]
    return front


def _front_by_peeling(points: Floats) -> Bools:
    """Of distinct points in lexicographic order (n, d), in O(n d) for each point of the front: the first that is left is on it,
    and all that it dominates go."""
    front, left = np.zeros(len(points), dtype=np.bool_), np.arange(len(points))
    while len(left):
        front[left[0]] = True
        left = left[(points[left] < points[left[0]]).any(axis=1)]
    return front


def hypervolume(values: npt.ArrayLike, maximised: Sequence[bool], reference: Sequence[float]) -> float:
    """Volume dominated by the points (n, d) and bounded by `reference` (d,), the worst of each objective; exact (Zitzler and
    Thiele 1999). Points that do not beat it in every objective, and NaN, add nothing. O(n log n) for two objectives, and n
    times as much for each further one: sliced along the last (While et al. 2006, HSO)."""
    sign = np.where(np.asarray(maximised, dtype=bool), -1.0, 1.0)
    points = np.asarray(values, dtype=np.float64).reshape(-1, len(sign)) * sign
    worst = np.asarray(reference, dtype=np.float64) * sign
    return _volume(points[(points < worst).all(axis=1) & np.isfinite(points).all(axis=1)], worst)


def hypervolume_gains(front: npt.ArrayLike, points: npt.ArrayLike, reference: Sequence[float]) -> Floats:
    """What each of the points (m, d) alone would add to the volume of `front` (n, d), all to be minimised: (m,). For two
    objectives the strips between neighbours of the front, O(m n); else m hypervolumes."""
    down, worst = [False] * len(reference), np.asarray(reference, dtype=np.float64)
    each = np.asarray(points, dtype=np.float64).reshape(-1, len(worst))
    known = np.asarray(front, dtype=np.float64).reshape(-1, len(worst))
    if len(worst) != 2:
        before = hypervolume(known, down, reference)
        return np.array([hypervolume(np.vstack([known, point]), down, reference) - before for point in each])
    known = np.unique(known[non_dominated(known, down)], axis=0)  # the one rises, the other falls
    starts = np.concatenate([[-np.inf], known[:, 0]]).clip(max=worst[0])
    heights = np.concatenate([[worst[1]], known[:, 1]]).clip(max=worst[1])
    ends = np.append(starts[1:], worst[0])
    widths = (ends - np.maximum(starts, each[:, :1])).clip(min=0)
    return np.asarray((widths * (heights - each[:, 1:]).clip(min=0)).sum(axis=1), dtype=np.float64)


def _volume(lower: Floats, worst: Floats) -> float:
    """Of points below `worst`."""
    front = lower[_front(lower)]
    if lower.shape[1] == 2:
        first, second = np.unique(front, axis=0).T  # the one rises, the other falls
        return float(np.sum(np.diff(np.append(first, worst[0])) * (worst[1] - second)))
    front = front[np.argsort(front[:, -1], kind="stable")]
    heights = np.diff(np.append(front[:, -1], worst[-1]))
    return float(sum(height * _volume(front[:number, :-1], worst[:-1])
                     for number, height in enumerate(heights.tolist(), start=1) if height))


def knee(values: npt.ArrayLike, maximised: Sequence[bool]) -> int | None:
    """Index of the candidate on the front with the smallest sum of objectives, each from 0 at the front's best to 1 at its
    worst; for two objectives the one farthest below the line between the ends (Das 1999). Of equal ones the first; None where
    none is below it, as on a front of fewer than three different points."""
    sign = np.where(np.asarray(maximised, dtype=bool), -1.0, 1.0)
    lower = np.asarray(values, dtype=np.float64).reshape(-1, len(sign)) * sign
    front = np.flatnonzero(non_dominated(values, maximised))
    if not len(front):
        return None
    best, worst = lower[front].min(axis=0), lower[front].max(axis=0)
    sums = ((lower[front] - best) / np.where(worst > best, worst - best, 1.0)).sum(axis=1)
    return int(front[sums.argmin()]) if sums.min() < min(1.0, sums.max()) - 1e-9 else None
