from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from plotly.graph_objects import Figure, Scatter
from synthetic_study import PROVENANCE, ROOT, SyntheticStudy

from analysis.candidates import candidates, frontier, setting
from analysis.importance import dependence, importance
from analysis.load import load
from analysis.plots import (
    SIZE_NAMES,
    dependence_figure,
    frontier_figure,
    importance_figure,
    sizes_of,
    trajectory_figure,
    trial_texts,
)


def visible(figure: Figure) -> dict[str, Scatter]:
    """Traces that are drawn, by name; plotly draws no empty one."""
    return {trace.name: trace for trace in figure.data if trace.visible is not False and len(trace.x)}


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
    front = traces["frontier (report split)"]
    assert list(front.x) == [372_800, 440_000, 488_000, 520_000, 560_000, 600_000, 680_000, 760_000, 920_000]
    assert front.y[-1] == pytest.approx(2 + 1.2 * 0.001 - 0.05 + 0.015)
    assert front.line.shape == "hv"
    assert len(traces["candidates"].x) == 12  # of 19, on the report split
    assert traces["dense baseline"].y.tolist() == pytest.approx([2.01])
    assert figure.layout.yaxis.title.text == "text/bits_per_byte<br>report split (lower is better)"


def test_a_point_says_how_to_make_it_again(frame: pd.DataFrame) -> None:
    shown = visible(frontier_figure(frame))["candidates"]
    (index,) = [i for i, (trial, depth, _) in enumerate(shown.customdata) if (trial, depth) == (3, 2)]
    assert shown.customdata[index][2] == pytest.approx(0.55)
    assert shown.text[index].replace("<br>", " ") == (
        "--schedule cubic --sparsity 0.7 --rounds 3 --l1-lambda 0.0001 --finetune-epochs 3.0")
    assert trial_texts(frame)[8].endswith("<br><i>failed: loss is NaN in round 1 &lt;script&gt;alert(&#x27;x&#x27;)"
                                          "&lt;/script&gt; &amp; &quot;more&quot;</i>")


@pytest.mark.parametrize("split", ["report", "selection"])
def test_a_picture_holds_values_of_one_split_only(frame: pd.DataFrame, split: str) -> None:
    figure = frontier_figure(frame, split)
    rows = candidates(frame)
    scored = rows[f"{split}/text/bits_per_byte"].dropna()
    for size in ("stored_bytes", "resident_bytes", "num_nonzero"):
        press(figure, SIZE_NAMES[size])
        shown = visible(figure)
        points = [point for name in ("candidates", "dense baseline") for point in zip(shown[name].x, shown[name].y)]
        assert [y for _, y in sorted(points)] == pytest.approx(
            rows.loc[scored.index].sort_values([size, scored.name])[scored.name].tolist())
        front = frontier(frame, split, size)
        assert shown[f"frontier ({split} split)"].x.tolist() == front[size].tolist()
        assert shown[f"frontier ({split} split)"].y.tolist() == pytest.approx(front[scored.name].tolist())
        (line,) = figure.layout.shapes
        assert line.y0 == line.y1 == rows.loc[rows["status"] == "dense", scored.name].iloc[0]
        assert f"{split} split" in figure.layout.yaxis.title.text
        assert all(f"on the {split} split" in trace.hovertemplate for trace in shown.values() if trace.hoverinfo != "skip")


def test_the_band_holds_the_frontier_and_belongs_to_the_split_that_is_published(frame: pd.DataFrame) -> None:
    figure = frontier_figure(frame)
    for label in map(SIZE_NAMES.get, sizes_of(frame)):
        press(figure, label)
        drawn = [trace for trace in figure.data if trace.visible is not False]
        (high,) = [trace for trace in drawn if trace.name == "95 % band of the frontier"]
        (low,) = [trace for trace in drawn if trace.hoverinfo == "skip" and trace is not high]
        assert (high.fill, high.x.tolist(), high.line.shape) == ("tonexty", low.x.tolist(), "hv")
        assert (low.y <= high.y).all()
        front = visible(figure)["frontier (report split)"]
        for x, y in zip(front.x, front.y):
            position = high.x.tolist().index(x)
            assert low.y[position] <= y <= high.y[position]
    assert not any(trace.fill for trace in frontier_figure(frame, "selection").data)


def test_measured_times_are_axes_of_what_was_measured_alike(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    fast, slow, smallest = study.trial(0, [0.2, 0.4, 0.6], report=True)
    (elsewhere,) = study.trial(1, [0.9], report=True)
    study.speed(elsewhere, 0.5, provenance=PROVENANCE.model_copy(update={"device": "H100", "created_at": "2026-11-22"}))
    assert "measured" not in str(frontier_figure(load(tmp_path / "study"), "selection").layout.updatemenus[0].buttons[1].label)
    for key, decode_ms, rate in ((ROOT, 8.0, 5e4), (fast, 4.0, 8e4), (slow, 6.0, 4e4), (smallest, 5.0, 1e5)):
        study.speed(key, decode_ms, rate)
    frame = load(tmp_path / "study")
    assert setting(frame, "speed") == ("8 sequences of 96 prompt and 32 new tokens on CPU, 2 cores; 1 measured otherwise "
                                       "before are left out: raysearch measure times what is on the frontier again")
    figure = frontier_figure(frame)
    assert [button.label for button in figure.layout.updatemenus[0].buttons][3:] == [
        "measured decoding time", "measured scoring time"]
    press(figure, "measured decoding time")
    front = visible(figure)["frontier (report split)"]
    assert front.x.tolist() == [0.5, 1.0]  # the best of those below dense is the fastest as well
    assert visible(figure)["candidates"].x[:3].tolist() == [0.5, 0.75, 0.625]
    assert np.isnan(visible(figure)["candidates"].x[3])
    assert (visible(figure)["dense baseline"].x.tolist(), figure.layout.xaxis.tickformat) == ([1.0], "~g")
    band = visible(figure)["95 % band of the frontier"]
    assert (band.x.tolist(), np.isfinite(band.y).all()) == ([0.5, 0.625, 0.75, 1.0], True)
    press(figure, "measured scoring time")
    assert visible(figure)["frontier (report split)"].x.tolist() == [0.5, 0.625, 1.0]


def test_without_items_there_is_no_band(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.2, 0.5], report=True)
    for file in (tmp_path / "study").rglob("items.report.npz"):
        file.unlink()
    figure = frontier_figure(load(tmp_path / "study"))
    assert not any(trace.fill for trace in figure.data)
    assert len(visible(figure)["frontier (report split)"].x) == 3


def test_selection_split_until_something_is_scored(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study", objectives=("stored_bytes", "last_word/acc"))
    study.dense(report=False)
    study.trial(0, [0.2, 0.5])
    figure = frontier_figure(load(tmp_path / "study"))
    traces = visible(figure)
    assert traces["frontier (selection split)"].x[0] == 2_500_000
    assert figure.layout.yaxis.title.text == "last_word/acc<br>selection split (higher is better)"
    assert figure.layout.xaxis.title.text == "stored bytes (smaller is better)"
    assert [[button.label for button in menu.buttons] for menu in figure.layout.updatemenus] == [
        ["stored bytes", "non-zero parameters", "resident bytes"]]


def test_ruined_candidates_do_not_flatten_the_split_that_they_are_on(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.2, 0.5], report=True)
    study.trial(1, [0.4])
    frame = load(tmp_path / "study")
    frame.loc[frame["trial"] == 1, "selection/text/bits_per_byte"] = 9.0
    figure = frontier_figure(frame)
    assert (figure.layout.yaxis.autorange, figure.layout.yaxis.range, figure.layout.annotations) == (True, None, ())
    figure = frontier_figure(frame, "selection")
    assert not figure.layout.yaxis.autorange
    assert figure.layout.yaxis.range[1] < 2.3
    assert [note.text for note in figure.layout.annotations] == ["1 outside this view; double-click shows all"]


def test_trajectories(frame: pd.DataFrame) -> None:
    figure = trajectory_figure(frame)
    on_front = set(candidates(frame).loc[frame["key"].isin(frontier(frame, "selection")["key"]), "trial"].dropna())
    lines = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    assert {int(name.split()[1]) for name in lines} >= on_front  # and trials that share a round with these
    assert lines["trial 1"].x.tolist()[-6:] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert lines["trial 1"].y[-6] == 2.0
    assert len({trace.line.color for trace in lines.values()}) == len(lines)
    (other,) = [trace for trace in figure.data if trace.name == "other trials"]
    assert np.isnan(other.y).sum() == 11 - len(lines)  # a gap before each; trial 8 has no finished round
    rounds = figure.layout.updatemenus[0].buttons[1].args[0]["x"][[trace.name for trace in figure.data].index("trial 1")]
    assert rounds.tolist()[-6:] == [0, 1, 2, 3, 4, 5]
    assert {trace.name for trace in figure.data if trace.mode == "markers"} == {
        "ended stopped", "ended failed", "still running"}


def test_a_fork_goes_on_from_its_candidate(frame: pd.DataFrame) -> None:
    frame["forked_from"] = frame["forked_from"].astype("object")
    frame.loc[frame["trial"] == 3, "forked_from"] = "trial 5 round 1"
    (line,) = [trace for trace in trajectory_figure(frame).data if trace.name == "trial 3"]
    assert line.x.tolist()[-4:] == pytest.approx([0.4, 0.3, 0.55, 0.7])
    assert line.y[-4] == pytest.approx(frame.loc[(frame["trial"] == 5) & (frame["round"] == 1),
                                                 "selection/text/bits_per_byte"].item())


def test_importance_figure_greys_what_chance_gives(frame: pd.DataFrame) -> None:
    table = importance(frame)
    bars = importance_figure(table, frame).data[0]
    grey = [colour == "#cbd5e1" for colour in bars.marker.color]
    assert grey == (table["share"] <= table["chance"]).tolist()[::-1]


def test_dependence_figure_has_a_row_per_level_of_the_most_important(frame: pd.DataFrame) -> None:
    table, effects = importance(frame), dependence(frame)
    figure = dependence_figure(table, effects, frame)
    (points,) = figure.data
    texts = figure.layout.yaxis.ticktext
    heads = [text.removeprefix("<b>").removesuffix("</b>") for text in texts if text.startswith("<b>")]
    assert heads == table["hyperparameter"].head(6).tolist()
    for head in heads:
        start = texts.index(f"<b>{head}</b>")
        of_head = effects[effects["hyperparameter"] == head]
        for row, (_, level) in enumerate(of_head.iterrows(), start=start + 1):
            (position,) = [i for i, y in enumerate(points.y) if y == row]
            assert texts[row] == level["level"]
            assert points.x[position] == pytest.approx(level["effect"])
            assert points.error_x.array[position] == pytest.approx(0 if np.isnan(level["stderr"]) else 2 * level["stderr"])


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


@pytest.mark.parametrize(("split", "value"), [("report", 1.935), ("selection", 1.925)])
def test_the_control_has_a_line_and_a_diamond_of_the_split_that_is_shown(controlled: pd.DataFrame, split: str, value: float
                                                                         ) -> None:
    figure = frontier_figure(controlled, split)
    dense, line = figure.layout.shapes
    assert (line.y0, line.y1, line.line.dash) == (pytest.approx(value), pytest.approx(value), "dot")
    assert line.line.color != dense.line.color
    shown = visible(figure)["dense control, trained as long"]
    assert (list(shown.x), list(shown.y)) == ([1_000_000], [pytest.approx(value)])
    assert shown.marker.color == line.line.color
    assert "<b>dense control, trained as long</b>" in shown.hovertemplate
    press(figure, "stored bytes")
    assert list(visible(figure)["dense control, trained as long"].x) == [4_000_000]


def test_without_a_control_there_is_no_second_line(frame: pd.DataFrame) -> None:
    figure = frontier_figure(frame)
    assert len(figure.layout.shapes) == 1
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
