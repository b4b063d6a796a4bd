from pathlib import Path

import pandas as pd
import pytest
from synthetic_study import SyntheticStudy

from analysis.candidates import frontier, knee_of
from analysis.load import load
from analysis.representatives import describe_representatives, representatives


def test_they_span_the_frontier(frame: pd.DataFrame) -> None:
    front = frontier(frame)
    rows = representatives(frame, 5)
    assert len(rows) == 5
    assert rows["num_nonzero"].is_monotonic_increasing
    assert rows["reason"].tolist()[0] == "the smallest"
    best = front.sort_values("report/text/bits_per_byte").iloc[0]
    assert rows.loc[rows["reason"] == "the best", "key"].tolist() == [best["key"]]
    bend = knee_of(frame, "report")
    assert bend is not None
    assert rows.loc[rows["reason"] == "where the frontier bends", "key"].tolist() == [bend["key"]]
    places = front["key"].tolist()
    gaps = pd.Series([places.index(key) for key in rows["key"]]).diff().dropna()
    assert gaps.max() <= 3  # of 9 on the frontier
    assert representatives(frame, 99)["key"].tolist() == places


def test_of_equal_candidates_one_stands_for_all(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.5], report=True)
    frame = load(tmp_path / "study")
    assert len(representatives(frame, 5)) == 1
    assert "0/1" in describe_representatives(representatives(frame, 5))
    with pytest.raises(ValueError, match="--representatives must be 2 or more, got 1"):
        representatives(frame, 1)
    with pytest.raises(ValueError, match="no candidate is on the frontier"):
        representatives(frame[frame["status"] == "dense"], 5)
