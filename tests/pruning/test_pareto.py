import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysearch.pruning.pareto import hypervolume, pareto_front

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
    assert hypervolume([p[0] for p in points], [p[1] for p in points], (6, 1)) == covered


def test_hypervolume_by_hand() -> None:
    assert hypervolume([0.5, 0.25], [1.0, 0.5], (1.0, 0.0)) == pytest.approx(0.5 * 1 + 0.25 * 0.5)
    assert hypervolume([1.0], [1.0], (1.0, 0.0)) == 0.0
    assert hypervolume([], [], (1.0, 0.0)) == 0.0


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"equal length, got shapes \(2,\) and \(1,\)"):
        pareto_front([1, 2], [1])
