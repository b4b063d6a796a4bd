"""Schedules: the suite that each one passes (end points, monotone, in [0, 1), rounding, refusals), and each one's formula at
hand-computed points."""

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysearch.pruning.schedules import SCHEDULES, resolve_schedule


def test_hand_computed_paths() -> None:
    assert resolve_schedule("one_shot", target_sparsity=0.3) == [0.3]
    assert resolve_schedule("one_shot", target_sparsity=0.0) == [0.0]
    assert resolve_schedule("constant", rate=0.2, num_rounds=3) == [0.2, 0.36, 0.488]
    assert resolve_schedule("constant", rate=0.5, num_rounds=2, initial_sparsity=0.5) == [0.75, 0.875]
    assert resolve_schedule("constant", rate=0.2, target_sparsity=0.4) == [0.2, 0.36, 0.4]
    assert resolve_schedule("constant", rate=0.2, target_sparsity=0.36) == [0.2, 0.36]
    assert resolve_schedule("linear", target_sparsity=0.5, num_rounds=5) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert resolve_schedule("exponential", target_sparsity=0.75, num_rounds=2) == [0.5, 0.75]
    assert resolve_schedule("cubic", target_sparsity=0.8, num_rounds=2) == [0.7, 0.8]  # 0.8 - 0.8 / 8
    assert resolve_schedule("cosine", target_sparsity=0.8, num_rounds=2) == [0.4, 0.8]
    assert resolve_schedule("cosine", target_sparsity=0.8, num_rounds=4)[0] == pytest.approx(
        0.4 * (1 - math.sqrt(0.5)), abs=1e-12
    )
    assert resolve_schedule("linear", initial_sparsity=0.2, target_sparsity=0.6, num_rounds=2) == [0.4, 0.6]


def test_two_ways_to_say_a_path_give_equal_lists() -> None:
    by_rate = resolve_schedule("constant", rate=0.2, num_rounds=9)
    by_target = resolve_schedule("constant", rate=0.2, target_sparsity=by_rate[-1])
    exponential = resolve_schedule("exponential", target_sparsity=by_rate[-1], num_rounds=9)
    assert by_rate == by_target == exponential


sparsity = st.floats(0, 0.99)


@given(st.sampled_from(["linear", "exponential", "cubic", "cosine"]), sparsity, sparsity, st.integers(1, 40))
def test_paths_rise_to_exactly_the_target(schedule: str, a: float, b: float, num_rounds: int) -> None:
    low, high = sorted((a, b))
    path = resolve_schedule(schedule, initial_sparsity=low, target_sparsity=high, num_rounds=num_rounds)
    assert len(path) == num_rounds
    assert path[-1] == round(high, 12)
    assert all(x <= y for x, y in itertools.pairwise([round(low, 12), *path]))


@given(sparsity, sparsity, st.floats(0.05, 0.9))
def test_constant_rate_removes_the_same_part_of_the_rest_until_the_target(a: float, b: float, rate: float) -> None:
    low, high = sorted((a, b))
    path = [low, *resolve_schedule("constant", initial_sparsity=low, target_sparsity=high, rate=rate)]
    assert path[-1] == round(high, 12)
    removed = [(y - x) / (1 - x) for x, y in itertools.pairwise(path)]
    assert removed[:-1] == pytest.approx([rate] * (len(path) - 2), abs=1e-9)
    assert -1e-9 <= removed[-1] <= rate + 1e-9


# ---- the suite ----

PATHS = {
    "one_shot": lambda low, high, num_rounds: {"initial_sparsity": low, "target_sparsity": high},
    "constant": lambda low, high, num_rounds: {"initial_sparsity": low, "num_rounds": num_rounds,
                                               "rate": 1 - ((1 - high) / (1 - low)) ** (1 / num_rounds)},
    **{name: lambda low, high, num_rounds: {"initial_sparsity": low, "target_sparsity": high, "num_rounds": num_rounds}
       for name in ("linear", "exponential", "cubic", "cosine")},
}
"""By schedule: settings of a path from `low` to `high` over so many rounds."""


@st.composite
def between(draw: st.DrawFn) -> tuple[float, float, int]:
    """(low, high, number of rounds), with a step that floating point resolves."""
    low = draw(st.floats(0, 0.98))
    return low, draw(st.floats(low + 0.005, 0.99)), draw(st.integers(1, 40))


def test_every_schedule_is_in_the_suite() -> None:
    assert set(PATHS) == set(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(between())
def test_a_path_starts_above_its_beginning_rises_and_ends_at_its_end(schedule: str, path: tuple[float, float, int]) -> None:
    low, high, num_rounds = path
    found = resolve_schedule(schedule, **PATHS[schedule](low, high, num_rounds))
    assert len(found) == (1 if schedule == "one_shot" else num_rounds)
    assert found[-1] == pytest.approx(high, abs=2e-12 if schedule == "constant" else 5.1e-13)
    assert all(round(low, 12) <= a <= b for a, b in itertools.pairwise([found[0], *found]))
    assert all(a < b for a, b in itertools.pairwise(found))
    assert all(0 <= sparsity < 1 for sparsity in found)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(between())
def test_a_path_is_rounded_to_twelve_digits_and_the_same_twice(schedule: str, path: tuple[float, float, int]) -> None:
    settings = PATHS[schedule](*path)
    found = resolve_schedule(schedule, **settings)
    assert found == [round(sparsity, 12) for sparsity in found] == resolve_schedule(schedule, **settings)


@pytest.mark.parametrize("schedule", [schedule for schedule in SCHEDULES if schedule != "constant"])
@pytest.mark.parametrize("num_rounds", [1, 7])
def test_a_path_that_goes_nowhere_stays(schedule: str, num_rounds: int) -> None:
    """Sparsity 0 is the dense control, and a path may begin where it ends."""
    for sparsity in (0.0, 0.3):
        found = resolve_schedule(schedule, **PATHS[schedule](sparsity, sparsity, num_rounds))
        assert set(found) == {sparsity}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("change", "sentence"), [
    ({"initial_sparsity": 1.0}, "initial_sparsity must be at least 0 and below 1, got 1"),
    ({"initial_sparsity": -0.1}, "initial_sparsity must be at least 0 and below 1, got -0.1"),
    ({"initial_sparsity": math.nan}, "initial_sparsity must be at least 0 and below 1, got nan"),
    ({"target_sparsity": 1.0}, "target_sparsity must be at least 0 and below 1, got 1"),
    ({"target_sparsity": math.nan}, "target_sparsity must be at least 0 and below 1, got nan"),
    ({"target_sparsity": 0.1, "initial_sparsity": 0.2}, "target_sparsity must be at least initial_sparsity (0.2)"),
])
def test_every_schedule_refuses_what_is_no_sparsity(schedule: str, change: dict[str, float], sentence: str) -> None:
    settings = PATHS[schedule](0.0, 0.5, 3) | change
    if schedule == "constant" and "target_sparsity" in change:
        del settings["num_rounds"]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        resolve_schedule(schedule, **settings)


# ---- contradictions ----


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"schedule": "cubik"}, f"schedule must be one of {', '.join(SCHEDULES)}, got 'cubik'"),
        ({"target_sparsity": 0.3, "initial_sparsity": 0.5}, "target_sparsity must be at least initial_sparsity (0.5)"),
        ({"target_sparsity": 1.0}, "target_sparsity must be at least 0 and below 1, got 1"),
        ({"target_sparsity": 1 - 1e-14}, "target_sparsity must be at least 0 and below 1, got 1"),
        ({"target_sparsity": -0.1}, "target_sparsity must be at least 0 and below 1, got -0.1"),
        ({"target_sparsity": math.nan}, "target_sparsity must be at least 0 and below 1, got nan"),
        ({"initial_sparsity": math.inf}, "initial_sparsity must be at least 0 and below 1, got inf"),
        ({"num_rounds": 0}, "num_rounds must be between 1 and 1000, got 0"),
        ({"num_rounds": 10**9}, "num_rounds must be between 1 and 1000, got 1000000000"),
        ({"num_rounds": None}, "num_rounds is required by schedule linear, got none"),
        ({"target_sparsity": None}, "target_sparsity is required by schedule linear, got none"),
        ({"rate": 0.2}, "rate belongs to the constant schedule only, got 0.2 with schedule linear"),
        ({"schedule": "one_shot", "num_rounds": 2}, "num_rounds must be 1 or absent with schedule one_shot, got 2"),
        ({"schedule": "constant"}, "rate is required by schedule constant, got none"),
        ({"schedule": "constant", "rate": 1.0}, "rate must be above 0 and below 1, got 1"),
        ({"schedule": "constant", "rate": 0.0}, "rate must be above 0 and below 1, got 0"),
        ({"schedule": "constant", "rate": math.nan}, "rate must be above 0 and below 1, got nan"),
        ({"schedule": "constant", "rate": 0.2}, "rate needs exactly one of num_rounds and target_sparsity beside it"),
        (
            {"schedule": "constant", "rate": 0.2, "num_rounds": None, "target_sparsity": None},
            "rate needs exactly one of num_rounds and target_sparsity beside it, got neither",
        ),
        (
            {"schedule": "constant", "rate": 1e-9, "num_rounds": None},
            "rate must reach target_sparsity 0.5 within 1000 rounds, got 1e-09",
        ),
        (
            {"schedule": "constant", "rate": 0.99, "num_rounds": 10, "target_sparsity": None},
            "rate must leave some weights after 10 rounds, got 0.99",
        ),
    ],
)
def test_contradictions_are_refused_in_one_sentence(settings: dict[str, object], sentence: str) -> None:
    arguments = {"schedule": "linear", "target_sparsity": 0.5, "num_rounds": 5} | settings
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        resolve_schedule(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
