"""The spread over seeds, by hand, beside the error over items."""

from pathlib import Path

import pytest
from synthetic_study import SyntheticStudy, metrics

from analysis.compare import compare
from analysis.load import load
from analysis.replicas import describe_spread, spread


def test_the_spread_is_that_of_the_replicas_and_the_items_that_of_the_pair(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.dense()
    (key,) = study.trial(0, [0.5], report=True)
    frame = load(tmp_path)
    table = spread(frame, key, [metrics(0.5, 0.0, shift) for shift in (0.0, 0.03, 0.06)]).set_index("metric")
    row, paired = table.loc["text/bits_per_byte"], compare(frame, "dense", key).set_index("metric")["stderr"]
    assert row["seeds"] == pytest.approx(0.03)
    assert row["mean"] == pytest.approx(2.15 + 0.03)
    assert row["picked"] == pytest.approx(2.15 + 0.015)
    assert row["dense"] == pytest.approx(2.01)
    assert row["items"] == paired["text/bits_per_byte"]
    assert row["both"] == pytest.approx((0.03**2 + row["items"] ** 2) ** 0.5)
    assert sorted(table.index) == sorted(metrics(0.5, 0.0))
    text = describe_spread(table.reset_index())
    assert "seeds: their standard deviation, of 3 known to about 50%" in text
    with pytest.raises(ValueError, match="at least 2 seeds whose rounds finished, got 1; give more --seeds"):
        spread(frame, key, [metrics(0.5, 0.0)])
