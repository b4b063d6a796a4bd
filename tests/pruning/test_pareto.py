import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysearch.pruning.pareto import hypervolume, hypervolume_gains, knee, non_dominated, pareto_front

VALUES = st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.5, float("nan"), float("inf"), float("-inf")])  # many ties
POINTS = st.lists(st.tuples(VALUES, VALUES), max_size=12)


def brute_force(points: list[tuple[float, float]]) -> list[bool]:
    finite = [np.isfinite(point).all() for point in points]

    def dominated(i: int) -> bool:
        (size, quality) = points[i]
        return any(finite[j] and s <= size and q >= quality and (s < size or q > quality)
                   for j, (s, q) in enumerate(points))

    return [bool(finite[i]) and not dominated(i) for i in range(len(points))]


@given(POINTS)
def test_front_equals_brute_force(points: list[tuple[float, float]]) -> None:
    sizes, qualities = [p[0] for p in points], [p[1] for p in points]
    assert pareto_front(sizes, qualities).tolist() == brute_force(points)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), max_size=30))
def test_front_equals_brute_force_on_floats(points: list[tuple[float, float]]) -> None:
    assert pareto_front([p[0] for p in points], [p[1] for p in points]).tolist() == brute_force(points)


def test_equal_points_are_both_kept_and_nan_never() -> None:
    assert pareto_front([1, 1, 2, 2, 0], [5, 5, 5, 6, np.nan]).tolist() == [True, True, False, True, False]
    assert pareto_front([], []).shape == (0,)


@given(st.lists(st.tuples(st.integers(-1, 7), st.integers(-1, 7)), max_size=8))
def test_hypervolume_counts_unit_squares(points: list[tuple[int, int]]) -> None:
    covered = sum(any(s <= x and q >= y + 1 for s, q in points) for x in range(-1, 6) for y in range(1, 8))
    assert hypervolume(points, (False, True), (6, 1)) == covered


def test_hypervolume_by_hand() -> None:
    assert hypervolume([(0.5, 1.0), (0.25, 0.5)], (False, True), (1.0, 0.0)) == pytest.approx(0.5 * 1 + 0.25 * 0.5)
    assert hypervolume([(1.0, 1.0)], (False, True), (1.0, 0.0)) == 0.0
    assert hypervolume([], (False, True), (1.0, 0.0)) == 0.0


def random_sets(num_sets: int) -> Iterator[tuple[np.ndarray, list[bool]]]:
    """Sets of 0 to 14 points in 2 to 4 objectives of every direction: integers, with many ties and doubles, or floats; now and
    then a number that is none."""
    random = np.random.default_rng(0)
    for number in range(num_sets):
        shape = (int(random.integers(0, 15)), int(random.integers(2, 5)))
        points = random.integers(0, 6, shape).astype(float) if number % 3 else random.random(shape) * 6
        points[random.random(shape) < (number % 5 == 0) * 0.1] = random.choice([np.nan, np.inf, -np.inf])
        yield points, random.integers(0, 2, shape[1]).astype(bool).tolist()


def test_front_volume_and_knee_of_1000_sets_equal_brute_force() -> None:
    for points, maximised in random_sets(1000):
        lower = np.where(maximised, -points, points)
        finite = np.isfinite(points).all(axis=1)
        wanted = [bool(finite[i]) and not any(finite[j] and (lower[j] <= lower[i]).all() and (lower[j] < lower[i]).any()
                                              for j in range(len(points))) for i in range(len(points))]
        assert non_dominated(points, maximised).tolist() == wanted
        on_front = [tuple(map(float, point)) for point in lower[wanted]]
        ends = [(min(column), max(column)) for column in zip(*on_front)]
        sums = [sum((x - low) / (high - low) for x, (low, high) in zip(point, ends) if high > low) for point in on_front]
        bends = bool(sums) and min(sums) < min(1, max(sums)) - 1e-9
        found = knee(points, maximised)
        assert (found is not None) == bends
        assert found is None or sums[np.flatnonzero(wanted).tolist().index(found)] == pytest.approx(min(sums), abs=1e-12)
        worst = np.where(maximised, -1.0, 5.0)
        inside = lower[finite & (lower < worst).all(axis=1)]
        edges = [np.unique(np.append(column, end)) for column, end in zip(inside.T, worst)]
        corners = np.stack(np.meshgrid(*[edge[:-1] for edge in edges], indexing="ij"), axis=-1)  # of the grid's cells
        cells = np.prod(np.stack(np.meshgrid(*map(np.diff, edges), indexing="ij"), axis=-1), axis=-1)
        covered = np.zeros(cells.shape, dtype=bool)
        for point in inside:
            covered |= (point <= corners).all(axis=-1)
        assert hypervolume(points, maximised, np.abs(worst).tolist()) == pytest.approx(cells[covered].sum(), abs=1e-9)


@pytest.mark.parametrize("num_objectives", [2, 3, 4])
def test_100000_candidates_take_less_than_a_second(num_objectives: int) -> None:
    random = np.random.default_rng(0)
    values, maximised = random.random((100_000, num_objectives)), [False] * num_objectives
    sets = [values, values.round(2)]
    if num_objectives < 4:  # all on the front
        sets.append(np.append(values[:, :-1], -values[:, :-1].sum(axis=1, keepdims=True), axis=1))
    for each in sets:
        began = time.process_time()
        front = non_dominated(each, maximised)
        assert time.process_time() - began < 1
    assert front.all() or num_objectives == 4


def test_the_knee_by_hand() -> None:
    assert knee([(0, 10), (1, 4), (4, 2), (10, 0), (9, 9)], (False, False)) == 1
    assert knee([(0, -10), (1, -4), (1, -4), (10, 0)], (False, True)) == 1  # of equal ones the first
    assert knee([(np.nan, 0), (0, 9), (3, 3), (9, 0)], (False, False)) == 2
    assert knee([(0, 0, 9), (0, 9, 0), (9, 0, 0), (1, 1, 1)], (False, False, False)) == 3
    assert knee([(0, 2), (1, 1), (2, 0)], (False, False)) is None  # a straight line
    assert knee([(0, 3), (2, 2), (3, 0)], (False, False)) is None  # it bulges
    assert knee([(0, 1), (1, 0), (2, 2)], (False, False)) is None
    assert knee([(1, 1)], (False, False)) is None
    assert knee([], (False, False)) is None


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12))
def test_the_knee_is_the_farthest_below_the_chord(points: list[tuple[int, int]]) -> None:
    front = sorted({point for point, on in zip(points, non_dominated(points, (False, False))) if on})
    (x0, y0), (x1, y1) = front[0], front[-1]
    below = [(y0 - y1) * (x1 - x) + (y1 - y) * (x1 - x0) for x, y in front]  # times the chord's length
    found = knee(points, (False, False))
    assert (found is None) == (max(below) <= 0)
    if found is not None:
        assert below[front.index(points[found])] == max(below)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"equal length, got shapes \(2,\) and \(1,\)"):
        pareto_front([1, 2], [1])


@pytest.mark.parametrize("num_objectives", [2, 3])
def test_the_gain_of_a_point_is_the_difference_of_two_volumes(num_objectives: int) -> None:
    generator = np.random.default_rng(0)
    reference = [0.9] * num_objectives  # some points lie beyond it
    for size in (0, 1, 2, 20):
        front, points = generator.random((size, num_objectives)), generator.random((30, num_objectives))
        points[0], points[1] = front[0] if size else points[0], 0.0  # one that is there already, one that beats all
        down = [False] * num_objectives
        by_hand = [hypervolume(np.vstack([front, point]), down, reference) - hypervolume(front, down, reference)
                   for point in points]
        assert hypervolume_gains(front, points, reference) == pytest.approx(by_hand, abs=1e-12)
