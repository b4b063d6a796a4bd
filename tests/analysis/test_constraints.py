"""Constraints from the command line, and how values and their resamples stand to them."""

import numpy as np
import pytest

from analysis.constraints import Check, Constraint, Measured, check_resampled, drop, parse_constraints, room_in_stderr
from analysis.uncertainty import resample
from raysearch.study.items import Items


def test_parse_constraints() -> None:
    found = parse_constraints("3MB", "700k", ["last_word/acc=1.0"], ["last_word/acc=0.5"], ["text/bits_per_byte=2.5"])
    assert [str(constraint) for constraint in found] == [
        "--max-bytes 3,000,000", "--max-nonzero 700,000", "--max-drop last_word/acc=1", "--min last_word/acc=0.5",
        "--max text/bits_per_byte=2.5"]
    found = parse_constraints(max_drop=["a/acc=1@95%", "a/acc=-0.5@99.5"], minimum=["a/acc=0.5@50%"])
    assert [(str(one), one.confidence) for one in found] == [
        ("--max-drop a/acc=1@95%", 0.95), ("--max-drop a/acc=-0.5@99.5%", 0.995), ("--min a/acc=0.5@50%", 0.5)]


@pytest.mark.parametrize(("text", "message"), [
    ("last_word/acc", "--min must be METRIC=NUMBER"), ("=1", "--min must be METRIC=NUMBER"),
    ("last_word/acc=nan", "--min must be METRIC=NUMBER"), ("last_word/speed=1", "its direction is not known"),
    ("last_word/acc=.5@", "--min must be METRIC=NUMBER"), ("last_word/acc=.5@x%", "--min must be METRIC=NUMBER"),
    ("last_word/acc=.5@95%%", "--min must be METRIC=NUMBER"), ("last_word/acc=.5@0.95", "confidence, 50 to 99.5 %"),
    ("last_word/acc=.5@100%", "confidence, 50 to 99.5 %"), ("last_word/acc=.5@nan", "confidence, 50 to 99.5 %"),
    ("last_word/acc=60", "--min last_word/acc must be a fraction between 0 and 1, got 60")])
def test_metric_constraints_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_constraints(minimum=[text])


def test_a_drop_by_hand() -> None:
    assert drop("last_word/acc", Measured(value=0.5, stderr=0.03), Measured(value=0.6, stderr=0.04)) == pytest.approx(
        (10.0, 5.0))
    assert drop("text/bits_per_byte", Measured(value=2.0, stderr=None), Measured(value=2.1, stderr=0.04)) == (
        pytest.approx(-0.1), None)


@pytest.mark.parametrize(("kind", "limit", "value", "side"), [("max_drop", 4.0, 2.5, 1), ("min", 0.5, 0.575, -1)])
def test_a_confidence_leaves_room_for_other_items(kind: str, limit: float, value: float, side: int) -> None:
    right = np.zeros((400, 2))
    right[:240, 0] = right[20:250, 1] = 1  # 20 lost and 10 won, so 2.5 points
    n = np.arange(400)
    draws = resample("a/acc", [Items(column, np.ones(400), n.astype(np.uint64), n) for column in right.T], num_draws=20_000)
    made = {confidence: check_resampled(Constraint(kind=kind, metric="a/acc", limit=limit, confidence=confidence), draws, 0, 1)
            for confidence in (0.5, 0.8, 0.95)}
    stderr = 100 * ((30 / 400 - 0.025**2) / 400 + 2 / 400**2) ** 0.5 if kind == "max_drop" else (0.575 * 0.425 / 400) ** 0.5
    for confidence, z in ((0.5, 0.0), (0.8, 0.8416), (0.95, 1.6449)):
        check = made[confidence]
        assert check.value == pytest.approx(value)
        assert check.stderr == pytest.approx(stderr, rel=0.03)
        assert check.bound == pytest.approx(value + side * z * stderr, abs=0.06 * stderr)
        assert check.margin == pytest.approx(side * (limit - check.bound), abs=1e-6)
        assert check.num_items == 400
    assert room_in_stderr(made[0.95]) == pytest.approx(side * (limit - value) / stderr, rel=0.03)


@pytest.mark.parametrize(("kind", "limit", "value"), [("min_tokens_per_s", 1000.0, 1200.0), ("max_ms", 4.0, 3.5)])
def test_what_keeps_an_exact_limit_has_room_without_end(kind: str, limit: float, value: float) -> None:
    constraint = Constraint(kind=kind, metric=None, limit=limit)
    assert room_in_stderr(Check(constraint=constraint, value=value, margin=constraint.room(value))) == np.inf
    missed = 2 * limit - value
    assert room_in_stderr(Check(constraint=constraint, value=missed, margin=constraint.room(missed))) == -np.inf


def test_a_drop_of_bits_is_a_rise() -> None:
    random, n = np.random.default_rng(0), np.arange(300)
    nats = random.exponential(1, 300)
    items = [Items(nats + rise + 0.1 * random.standard_normal(300), np.ones(300), n.astype(np.uint64), n) for rise in (0, 0.2)]
    limit = Constraint(kind="max_drop", metric="a/bits_per_byte", limit=0.3, confidence=0.95)
    check = check_resampled(limit, resample("a/bits_per_byte", items), 0, 1)
    assert check.value == pytest.approx(0.2 / np.log(2), abs=0.03)
    assert check.value + check.stderr < check.bound < check.value + 2.2 * check.stderr
