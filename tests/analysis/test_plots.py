from pathlib import Path

import pandas as pd
import pytest
from plotly.graph_objects import Figure, Scatter
from synthetic_study import SyntheticStudy

from analysis.importance import importance
from analysis.load import load
from analysis.plots import frontier_figure, importance_figure, trajectory_figure


def visible(figure: Figure) -> dict[str, Scatter]:
    return {trace.name: trace for trace in figure.data if trace.visible}


def test_frontier_figure_shows_these_points(frame: pd.DataFrame) -> None:
    traces = visible(frontier_figure(frame))
    front = traces["frontier (report split, ± 1 standard error)"]
    assert list(front.x) == [372_800, 440_000, 488_000, 520_000, 560_000, 600_000, 680_000, 760_000, 920_000]
    assert front.y[-1] == pytest.approx(2 + 1.2 * 0.001 - 0.05 + 0.015)
    assert set(front.error_y.array) == {0.02}
    assert front.line.shape == "hv"
    assert len(traces["not on the frontier (report value)"].x) == 3
    assert len(traces["not on the frontier (selection value)"].x) == 7  # 19 candidates, 12 scored on report
    assert traces["not on the frontier (selection value)"].marker.symbol == "circle-open"
    assert list(traces["dense baseline"].y) == [2.01]


def test_the_switch_shows_stored_bytes(frame: pd.DataFrame) -> None:
    figure = frontier_figure(frame)
    first, second = figure.layout.updatemenus[0].buttons
    assert (first.label, second.label) == ("non-zero parameters", "stored bytes")
    shown = [trace for trace, on in zip(figure.data, second.args[0]["visible"]) if on]
    assert {trace.meta for trace in shown} == {"stored_bytes"}
    assert max(max(trace.x) for trace in shown) == 4_000_000
    assert [trace.visible for trace in figure.data] == first.args[0]["visible"]


def test_selection_split_until_something_is_scored(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study", size="stored_bytes", objective="last_word/acc")
    study.dense(report=False)
    study.trial(0, [0.2, 0.5])
    figure = frontier_figure(load(tmp_path / "study"))
    traces = visible(figure)
    assert traces["frontier (selection split, ± 1 standard error)"].x[0] == 2_500_000
    assert figure.layout.yaxis.title.text == "last_word/acc (higher is better)"
    assert figure.layout.xaxis.title.text == "stored bytes (smaller is better)"


def test_ruined_candidates_do_not_flatten_the_figure(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.2, 0.5], report=True)
    frame = load(tmp_path / "study")
    assert frontier_figure(frame).layout.yaxis.range is None
    study.trial(1, [0.4])
    frame = load(tmp_path / "study")
    frame.loc[frame["trial"] == 1, "selection/text/bits_per_byte"] = 9.0
    figure = frontier_figure(frame)
    assert figure.layout.yaxis.range[1] < 2.3
    assert "1 outside this view; double-click shows all" in [note.text for note in figure.layout.annotations]


def test_trajectories(frame: pd.DataFrame) -> None:
    figure = trajectory_figure(frame)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(lines) == 11  # trial 8 has no finished round
    assert list(lines[1].x) == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert lines[1].y[0] == 2.0
    assert list(figure.layout.updatemenus[0].buttons[1].args[0]["x"][1]) == [0, 1, 2, 3, 4, 5]
    assert {trace.name for trace in figure.data if trace.mode == "markers"} == {
        "ended done", "ended stopped", "ended failed", "still running"}
    assert len({trace.line.color for trace in lines}) == 11


def test_importance_figure_greys_what_chance_gives(frame: pd.DataFrame) -> None:
    table = importance(frame)
    bars = importance_figure(table, frame).data[0]
    grey = [colour == "#cbd5e1" for colour in bars.marker.color]
    assert grey == (table["share"] <= table["chance"]).tolist()[::-1]


def test_figures_say_model_hardware_and_day(frame: pd.DataFrame) -> None:
    for figure in (frontier_figure(frame), trajectory_figure(frame)):
        assert figure.layout.title.text == "tiny-gpt · CPU, 2 cores · 2026-11-23"


def test_empty_studies_still_draw(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    for _ in range(2):
        frame = load(tmp_path / "study")
        assert frontier_figure(frame).layout.annotations[-1].text == "no candidate scored yet"
        assert trajectory_figure(frame).layout.annotations[-1].text == "no candidate scored yet"
        study.trial(0, [0.5], status="failed", num_finished=0, reason="diverged")
