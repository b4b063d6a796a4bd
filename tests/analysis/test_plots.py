from pathlib import Path

import pandas as pd
import pytest
from plotly.graph_objects import Figure, Scatter
from synthetic_study import SyntheticStudy

from analysis.candidates import candidates, frontier
from analysis.importance import importance
from analysis.load import load
from analysis.plots import frontier_figure, importance_figure, trajectory_figure


def visible(figure: Figure) -> dict[str, Scatter]:
    """Traces that are drawn, by name; plotly draws no empty one."""
    return {trace.name: trace for trace in figure.data if trace.visible and len(trace.x)}


def press(figure: Figure, label: str) -> None:
    """What plotly's method `update` does in a browser when the button is pressed."""
    (button,) = [button for menu in figure.layout.updatemenus for button in menu.buttons if button.label == label]
    traces, layout = button.args
    for name, values in traces.items():
        for trace, value in zip(figure.data, values, strict=True):
            trace[name] = value
    for name, value in layout.items():
        figure.layout[name] = value


def test_frontier_figure_shows_these_points(frame: pd.DataFrame) -> None:
    figure = frontier_figure(frame)
    traces = visible(figure)
    front = traces["frontier (report split, ± 1 standard error)"]
    assert list(front.x) == [372_800, 440_000, 488_000, 520_000, 560_000, 600_000, 680_000, 760_000, 920_000]
    assert front.y[-1] == pytest.approx(2 + 1.2 * 0.001 - 0.05 + 0.015)
    assert set(front.error_y.array) == {0.02}
    assert front.line.shape == "hv"
    assert len(traces["not on the frontier"].x) == 3  # 19 candidates, 12 scored on the report split
    assert list(traces["dense baseline"].y) == [2.01]
    assert figure.layout.yaxis.title.text == "text/bits_per_byte<br>report split (lower is better)"


def test_a_picture_holds_values_of_one_split_only(frame: pd.DataFrame) -> None:
    figure = frontier_figure(frame)
    rows = candidates(frame)
    for split, label in (("report", "report split"), ("selection", "selection split (what the search saw)")):
        press(figure, label)
        scored = rows[f"{split}/text/bits_per_byte"].dropna()
        for size in ("stored bytes", "non-zero parameters"):
            press(figure, size)
            shown = visible(figure)
            assert sorted(y for trace in shown.values() for y in trace.y) == sorted(scored)
            (baseline,) = shown["dense baseline"].y
            band, line = figure.layout.shapes
            assert line.y0 == line.y1 == baseline == rows.loc[rows["status"] == "dense", scored.name].iloc[0]
            assert (band.y0, band.y1) == pytest.approx((baseline - 0.02, baseline + 0.02))
            assert f"{split} split" in figure.layout.yaxis.title.text
            assert all(f"on the {split} split" in text for trace in shown.values() for text in trace.hovertext)


def test_the_buttons_for_size_and_split_combine(frame: pd.DataFrame) -> None:
    figure = frontier_figure(frame)
    splits, sizes = figure.layout.updatemenus
    assert [button.label for button in splits.buttons] == ["report split", "selection split (what the search saw)"]
    assert [button.label for button in sizes.buttons] == ["non-zero parameters", "stored bytes"]
    press(figure, "stored bytes")
    press(figure, "selection split (what the search saw)")
    front = frontier(frame, "selection", "stored_bytes")
    shown = visible(figure)["frontier (selection split, ± 1 standard error)"]
    assert list(shown.x) == front["stored_bytes"].tolist()
    assert list(shown.y) == front["selection/text/bits_per_byte"].tolist()
    assert [text.split(" (")[0] for text in shown.hovertext] == [
        f"<b>trial {row['trial']}, round {row['round']}" for _, row in front.iterrows()]
    assert max(max(trace.x) for trace in visible(figure).values()) == 4_000_000
    assert figure.layout.xaxis.title.text == "stored bytes (smaller is better)"


def test_selection_split_until_something_is_scored(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study", size="stored_bytes", objective="last_word/acc")
    study.dense(report=False)
    study.trial(0, [0.2, 0.5])
    figure = frontier_figure(load(tmp_path / "study"))
    traces = visible(figure)
    assert traces["frontier (selection split, ± 1 standard error)"].x[0] == 2_500_000
    assert figure.layout.yaxis.title.text == "last_word/acc<br>selection split (higher is better)"
    assert figure.layout.xaxis.title.text == "stored bytes (smaller is better)"
    assert [[button.label for button in menu.buttons] for menu in figure.layout.updatemenus] == [
        ["stored bytes", "non-zero parameters"]]


def test_ruined_candidates_do_not_flatten_the_split_that_they_are_on(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.2, 0.5], report=True)
    study.trial(1, [0.4])
    frame = load(tmp_path / "study")
    frame.loc[frame["trial"] == 1, "selection/text/bits_per_byte"] = 9.0
    figure = frontier_figure(frame)
    assert (figure.layout.yaxis.autorange, figure.layout.yaxis.range, figure.layout.annotations) == (True, None, ())
    press(figure, "selection split (what the search saw)")
    assert not figure.layout.yaxis.autorange
    assert figure.layout.yaxis.range[1] < 2.3
    assert [note.text for note in figure.layout.annotations] == ["1 outside this view; double-click shows all"]
    press(figure, "report split")
    assert (figure.layout.yaxis.autorange, figure.layout.annotations) == (True, ())


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


def test_the_control_has_a_line_a_band_and_a_diamond_of_the_split_that_is_shown(controlled: pd.DataFrame) -> None:
    figure = frontier_figure(controlled)
    for split, label, value in (("report", "report split", 1.935),
                                ("selection", "selection split (what the search saw)", 1.925)):
        press(figure, label)
        band, line = figure.layout.shapes[2:]
        assert (line.y0, line.y1, line.line.dash) == (pytest.approx(value), pytest.approx(value), "dot")
        assert (band.y0, band.y1) == pytest.approx((value - 0.02, value + 0.02))
        assert line.line.color != figure.layout.shapes[1].line.color
        shown = visible(figure)["dense control, trained as long"]
        assert (list(shown.x), list(shown.y)) == ([1_000_000], [pytest.approx(value)])
        assert shown.marker.color == line.line.color
        assert f"on the {split} split" in shown.hovertext[0]
        assert "<b>dense control, round 3</b>" in shown.hovertext[0]
    press(figure, "stored bytes")
    assert list(visible(figure)["dense control, trained as long"].x) == [4_000_000]


def test_without_a_control_there_is_no_second_line(frame: pd.DataFrame) -> None:
    figure = frontier_figure(frame)
    assert len(figure.layout.shapes) == 2
    assert "dense control, trained as long" not in visible(figure)


def test_a_control_is_no_trajectory(controlled: pd.DataFrame, frame: pd.DataFrame) -> None:
    assert len(trajectory_figure(controlled).data) == len(trajectory_figure(frame).data)


def test_the_view_of_ruined_candidates_holds_the_control(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.2, 0.5], report=True, finetune_epochs=1.0)
    study.trial(1, [0.95], report=True)
    study.control()
    frame = load(tmp_path / "study")
    frame.loc[frame["trial"] == 1, "report/text/bits_per_byte"] = 9.0
    frame.loc[frame["status"] == "control", "report/text/bits_per_byte"] = 1.5
    frame.loc[frame["trial"] == 1, "num_nonzero"] = 2_000_000
    frame.loc[frame["trial"] == 1, "stored_bytes"] = 9_000_000
    assert frontier_figure(frame).layout.yaxis.range[0] < 1.5
