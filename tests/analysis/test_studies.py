from pathlib import Path

import pandas as pd
import pytest
from synthetic_study import SyntheticStudy

from analysis.candidates import relative_hypervolume
from analysis.load import load
from analysis.studies import compare_studies, hypervolume_over_time, progress_figure, relative_frontier, studies_figure


def test_each_study_in_units_of_its_own_dense_model(frame: pd.DataFrame, tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study", objectives=("stored_bytes", "last_word/acc"))
    study.dense()
    study.trial(0, [0.1, 0.5], report=True)
    other = load(tmp_path / "study")
    table = compare_studies({"bits": frame, "accuracy": other})
    assert table["within_1_percent"].tolist() == pytest.approx([0.68, 1.0])
    assert table["trials"].tolist() == [12, 1]
    assert table.loc["bits", "hypervolume"] == relative_hypervolume(frame)
    assert table.loc["bits", "low"] < table.loc["bits", "hypervolume"] < table.loc["bits", "high"]
    assert (relative_frontier(other)["quality"] <= 1).all()
    assert relative_frontier(frame)["quality"].max() > 1  # some are better than dense
    assert [trace.name for trace in studies_figure({"bits": frame, "accuracy": other}).data] == ["bits", "accuracy"]


def test_hypervolume_over_time_grows_to_the_study_s(frame: pd.DataFrame) -> None:
    rows = hypervolume_over_time(frame)
    assert rows["hypervolume"].is_monotonic_increasing
    assert rows["hypervolume"].iloc[-1] == pytest.approx(relative_hypervolume(frame, "selection"))
    assert rows["hours"].iloc[-1] == pytest.approx(3 * 20 / 3600)  # 19 candidates and dense, aliases computed once
    assert len(hypervolume_over_time(frame, 3)) == 3


def test_studies_without_a_candidate(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    table = compare_studies({"empty": load(tmp_path / "study")})
    assert table["candidates"].tolist() == [0]
    assert table[["dense", "hypervolume", "within_1_percent"]].isna().all(axis=None)
    study.dense()
    assert len(progress_figure({"dense": load(tmp_path / "study")}).data[0].x) == 1
