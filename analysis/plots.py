"""The figures: each takes a loaded frame and returns a plotly Figure, usable alone in a notebook.

Every figure says above its axes on which model and hardware, and when, its numbers were made.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from analysis.candidates import SIZES, candidates, control_rows, frontier, frontier_split, quality, quality_stderr, setting
from analysis.tables import describe_config, with_stderr
from raysearch.config import higher_is_better
from raysearch.units import human_bytes

INK, MUTED, GRID, BLUE, PALE, AMBER = "#1f2937", "#6b7280", "#e5e7eb", "#2563eb", "#aab2bf", "#d97706"
SIZE_NAMES = {"num_nonzero": "non-zero parameters", "stored_bytes": "stored bytes"}
SPLIT_LABELS = {"report": "report split", "selection": "selection split (what the search saw)"}
STATUS_SYMBOLS = {"done": "circle", "stopped": "square", "failed": "x", "running": "triangle-right"}
BUTTON_ROW_PX, LEFT_PX = 36, 84
Button = tuple[str, dict[str, object], dict[str, object]]
"""Label, what it changes in the traces, what it changes in the layout."""


def frontier_figure(frame: pd.DataFrame) -> go.Figure:
    """Size against the objective on one split at a time, with buttons for the size and, where both were scored, the split.

    It opens on the report split once a candidate is scored there; the selection split holds all candidates. Each has its
    own frontier (a staircase, error bars of one standard error), its own dense baseline and dense control (dotted lines, each
    with a band of one standard error) and its own range of y; all other candidates are grey. The splits never share a picture:
    they hold different items, and one may be easier by more than the candidates differ."""
    splits = ["report", "selection"] if frontier_split(frame) == "report" else ["selection"]
    sizes = sorted(SIZES, key=lambda size: size != setting(frame, "size"))
    drawn = {(split, size): _frontier_traces(frame, split, size) for split in splits for size in sizes}
    views = {split: _view(frame, split) for split in splits}
    figure = go.Figure([go.Scatter(trace, visible=split == splits[0], meta=split)
                        for split in splits for trace in drawn[split, sizes[0]]])
    figure.update_layout(views[splits[0]])
    _style(figure, frame)
    figure.update_xaxes(title_text=_size_title(sizes[0]), tickformat="~s")
    # the size buttons change the points of both splits and the split buttons what is visible, so any two combine
    of_size: list[Button] = [
        (SIZE_NAMES[size], _points([trace for split in splits for trace in drawn[split, size]]),
         {"xaxis.title.text": _size_title(size)}) for size in sizes]
    of_split: list[Button] = [(SPLIT_LABELS[split], {"visible": [trace.meta == split for trace in figure.data]}, views[split])
                              for split in splits]
    _add_buttons(figure, [of_split, of_size] if len(splits) > 1 else [of_size])
    return figure


def trajectory_figure(frame: pd.DataFrame) -> go.Figure:
    """The objective on the selection split along the rounds of every trial, from the dense baseline on; one colour
    per trial, and at its last finished round a marker for its status. Buttons: against sparsity, or rounds."""
    objective = setting(frame, "objective")
    rows = frame[quality(frame, "selection").notna() & (frame["status"] != "control")].sort_values(["trial", "round"])
    baseline, rows = rows[rows["status"] == "dense"], rows[rows["status"] != "dense"]
    start = [(0.0, float(value)) for value in baseline[f"selection/{objective}"]]  # of every path; empty without one
    numbers = sorted({int(trial) for trial in rows["trial"]})
    # the last 8 % of Viridis is a yellow that white paper swallows
    shades = sample_colorscale("Viridis", [0.92 * i / max(1, len(numbers) - 1) for i in range(len(numbers))])
    figure = go.Figure()
    paths: dict[str, list[list[float]]] = {"sparsity": [], "round": []}
    for number, shade in zip(numbers, shades):
        path = rows[rows["trial"] == number]
        for axis, of_trials in paths.items():
            of_trials.append([x for x, _ in start] + path[axis].astype(float).tolist())
        status = str(path["status"].iloc[-1])
        hover = [f"trial {number}: dense baseline" for _ in start]
        hover += [_hover(row, f"selection/{objective}", f"trial {number}, round {row['round']} ({status})")
                  for _, row in path.iterrows()]
        figure.add_trace(go.Scatter(
            x=paths["sparsity"][-1], y=[y for _, y in start] + path[f"selection/{objective}"].tolist(),
            mode="lines+markers", line={"color": shade, "width": 1.6}, hovertext=hover, hoverinfo="text",
            showlegend=False, marker={"color": shade, "opacity": 1, "size": [5] * (len(hover) - 1) + [10],
                                      "symbol": ["circle"] * (len(hover) - 1) + [STATUS_SYMBOLS[status]]}))
    present = [status for status in STATUS_SYMBOLS if (rows["status"] == status).any()]
    for status in present:
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=f"ended {status}".replace(
            "ended running", "still running"), marker={"symbol": STATUS_SYMBOLS[status], "size": 10, "color": MUTED}))
    figure.update_layout(_limited_y(frame, "selection"))
    _style(figure, frame)
    figure.update_xaxes(title_text="sparsity")
    figure.update_yaxes(title_text=f"{html.escape(objective)}, selection split")
    legend_only: list[list[float | None]] = [[None] for _ in present]
    _add_buttons(figure, [[(axis, {"x": [*paths[axis], *legend_only]}, {"xaxis.title.text": axis}) for axis in paths]])
    return figure


def importance_figure(table: pd.DataFrame, frame: pd.DataFrame) -> go.Figure:
    """Bars of `analysis.importance.importance`; grey where the share is not above what chance gives (the tick)."""
    table = table.iloc[::-1]
    clear = table["share"] > table["chance"]
    hover = [f"{row['hyperparameter']}: {row['share']:.0%} of the variance at equal size<br>chance reaches "
             f"{row['chance']:.0%}<br>best level: {html.escape(row['best_level'])}" for _, row in table.iterrows()]
    best = [f"best: {html.escape(level)}" if shown else "" for level, shown in zip(table["best_level"], clear)]
    figure = go.Figure([
        go.Bar(x=table["share"], y=table["hyperparameter"], orientation="h", hovertext=hover, hoverinfo="text",
               text=best, textposition="inside", insidetextanchor="start", showlegend=False,
               marker={"color": [BLUE if shown else "#cbd5e1" for shown in clear]}),
        go.Scatter(x=table["chance"], y=table["hyperparameter"], mode="markers", name="95 % of chance lies below",
                   marker={"symbol": "line-ns", "size": 16, "line": {"width": 2.5, "color": AMBER}}, hoverinfo="skip")])
    _style(figure, frame)
    figure.update_layout(height=150 + 34 * len(table), bargap=0.4, margin_t=36)
    figure.update_xaxes(title_text="share of variance explained", tickformat=".0%",
                        range=[0, max(0.05, 1.08 * float(table[["share", "chance"]].to_numpy().max()))])
    figure.update_yaxes(showgrid=False)
    return figure


def made_with(frame: pd.DataFrame) -> str:
    """Model, hardware and day of the numbers, in one line."""
    model = PurePath(setting(frame, "model")).name
    return f"{model} · {setting(frame, 'device')} · {setting(frame, 'created_at')[:10]}"


def _frontier_traces(frame: pd.DataFrame, split: str, size: str) -> list[go.Scatter]:
    """Candidates beside the frontier, frontier, dense baseline, dense control: always these four, so that the traces of one
    size can take the place of another's. Only what was scored on `split`; plotly leaves an empty one out of the legend."""
    pool = candidates(frame)
    pool = pool[quality(pool, split).notna()]
    front = frontier(frame, split, size)
    is_dense = pool["status"] == "dense"
    beaten = pool[~is_dense & ~pool["key"].isin(front["key"])]
    staircase = {"mode": "lines+markers", "line": {"color": BLUE, "width": 2, "shape": "hv"},
                 "marker": {"color": BLUE, "size": 9, "line": {"color": "white", "width": 1.2}}}
    dots = {"mode": "markers", "marker": {"color": PALE, "size": 8 if len(beaten) <= 150 else 5}}
    trained = control_rows(frame)
    trained = trained[quality(trained, split).notna()]
    return [_trace(beaten, split, size, "not on the frontier", PALE, dots),
            _trace(front, split, size, f"frontier ({split} split, ± 1 standard error)", BLUE, staircase),
            _trace(pool[is_dense], split, size, "dense baseline", INK, _diamond(INK)),
            _trace(trained, split, size, "dense control, trained as long", AMBER, _diamond(AMBER))]


def _diamond(colour: str) -> dict[str, object]:
    return {"mode": "markers", "marker": {"color": colour, "size": 11, "symbol": "diamond"}}


def _trace(rows: pd.DataFrame, split: str, size: str, name: str, colour: str, look: Mapping[str, object]) -> go.Scatter:
    objective = setting(rows, "objective")
    hover = [_hover(row, f"{split}/{objective}", _title(row)) for _, row in rows.iterrows()]
    return go.Scatter(  # abs: the quality of a metric where lower is better is its negative
        x=rows[size].astype(float).tolist(), y=quality(rows, split).abs().tolist(), name=name, hovertext=hover,
        hoverinfo="text", error_y={"array": quality_stderr(rows, split).fillna(0).tolist(), "color": colour,
                                   "thickness": 1.2 if colour == BLUE else 0.6, "width": 3 if colour == BLUE else 0},
        **look)


def _title(row: pd.Series) -> str:
    if row["status"] == "dense":
        return "dense baseline"
    if row["status"] == "control":
        return f"dense control, round {row['round']}"
    return f"trial {row['trial']}, round {row['round']} ({row['status']})"


def _hover(row: pd.Series, column: str, title: str) -> str:
    """Lines of a hover box, escaped: plotly reads a little HTML in them. `column`: of the split in the picture."""
    split, _, objective = column.partition("/")
    lines = [f"<b>{html.escape(title)}</b>", html.escape(describe_config(row)),
             f"sparsity {row['sparsity']:.3f}, of the whole model {row['model_sparsity']:.3f}",
             f"{row['num_nonzero']:,} non-zero, {human_bytes(row['stored_bytes'])} stored"]
    value = with_stderr(float(row[column]), float(row[f"{column}_stderr"]))
    lines.append(f"{html.escape(objective)} {value} on the {split} split")
    if pd.notna(row["reason"]):
        reason = str(row["reason"])
        lines.append(f"<i>{html.escape(reason if len(reason) <= 90 else reason[:89] + '…')}</i>")
    return "<br>".join(lines)


def _points(traces: Sequence[go.Scatter]) -> dict[str, object]:
    """What a button must change to show these points in the place of the others: one entry per trace."""
    return {"x": [trace.x for trace in traces], "y": [trace.y for trace in traces],
            "hovertext": [trace.hovertext for trace in traces], "error_y.array": [trace.error_y.array for trace in traces]}


def _view(frame: pd.DataFrame, split: str) -> dict[str, object]:
    """The part of the layout that belongs to one split."""
    objective = setting(frame, "objective")
    direction = "higher" if higher_is_better(objective) else "lower"
    return {"yaxis.title.text": f"{html.escape(objective)}<br>{split} split ({direction} is better)",
            "shapes": [*_bands(frame[frame["status"] == "dense"], split, INK), *_bands(control_rows(frame), split, AMBER)],
             **_limited_y(frame, split)}


def _bands(rows: pd.DataFrame, split: str, colour: str) -> list[dict[str, object]]:
    """The value of each row on `split` as a dotted line, one standard error around it as a band."""
    shapes: list[dict[str, object]] = []
    for value, stderr in zip(quality(rows, split).abs(), quality_stderr(rows, split).fillna(0)):
        if not np.isnan(value):
            across = {"xref": "paper", "x0": 0, "x1": 1, "layer": "below"}
            shapes.append({"type": "rect", "y0": value - stderr, "y1": value + stderr, "fillcolor": colour, "opacity": 0.07,
                           "line": {"width": 0}, **across})
            shapes.append({"type": "line", "y0": value, "y1": value, "line": {"color": colour, "width": 1.2, "dash": "dot"},
                           **across})
    return shapes


def _size_title(size: str) -> str:
    return f"{SIZE_NAMES[size]} (smaller is better)"


def _limited_y(frame: pd.DataFrame, split: str) -> dict[str, object]:
    """Layout that keeps a few ruined candidates from flattening the figure: where the values on `split` span more than
    three times those of its frontiers (by each size), dense baseline and dense control, the axis opens on these, and a note
    counts the candidates outside."""
    pool = candidates(frame)
    values = quality(pool, split).abs()
    on_frontier = {key for size in SIZES for key in frontier(frame, split, size)["key"]}
    matter = values[pool["key"].isin(on_frontier) | (pool["status"] == "dense")].dropna()
    matter = pd.concat([matter, quality(control_rows(frame), split).abs().dropna()])
    if matter.empty or values.max() - values.min() <= 3 * (matter.max() - matter.min()):
        return {"yaxis.autorange": True, "annotations": []}
    pad = 0.15 * (matter.max() - matter.min()) or 0.05 * matter.max()
    low, high = float(matter.min() - pad), float(matter.max() + pad)
    num_outside = int(((values < low) | (values > high)).sum())
    note = {"text": f"{num_outside} outside this view; double-click shows all", "x": 1, "y": 1, "xref": "paper",
            "yref": "paper", "xanchor": "right", "yanchor": "top", "showarrow": False,
            "font": {"size": 11, "color": MUTED}, "bgcolor": "white"}
    return {"yaxis.autorange": False, "yaxis.range": [low, high], "annotations": [note] if num_outside else []}


def _add_buttons(figure: go.Figure, rows: Sequence[Sequence[Button]]) -> None:
    """Rows of buttons above the axes, the first at the top; the first button of each is what the figure opens with."""
    look = {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
            "bgcolor": "white", "bordercolor": GRID, "font": {"size": 12}, "showactive": True}
    height = BUTTON_ROW_PX * len(rows)
    # they begin left of the y axis, at the figure's edge, so that two fit on a telephone
    figure.update_layout(margin_t=40 + height, height=figure.layout.height + height - BUTTON_ROW_PX, updatemenus=[
        {**look, "pad": {"l": -LEFT_PX, "b": 6 + BUTTON_ROW_PX * (len(rows) - 1 - index)},
         "buttons": [{"label": label, "method": "update", "args": [traces, layout]} for label, traces, layout in row]}
        for index, row in enumerate(rows)])


def _style(figure: go.Figure, frame: pd.DataFrame) -> None:
    axis = {"gridcolor": GRID, "linecolor": "#9ca3af", "zeroline": False, "ticks": "outside", "tickcolor": "#9ca3af",
            "ticklen": 4, "automargin": True, "title": {"standoff": 10, "font": {"size": 13}}}
    figure.update_layout(
        template="none", paper_bgcolor="white", plot_bgcolor="white", height=520, hovermode="closest",
        font={"family": "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif",
              "size": 13, "color": INK},
        hoverlabel={"bgcolor": "white", "bordercolor": GRID, "align": "left", "font": {"size": 12, "color": INK}},
        title={"text": html.escape(made_with(frame)), "x": 0, "xref": "container", "xanchor": "left", "y": 1,
               "yref": "container", "yanchor": "top", "pad": {"t": 8}, "font": {"size": 11, "color": MUTED}},
        margin={"l": LEFT_PX, "r": 16, "t": 76, "b": 90}, xaxis=axis, yaxis=axis,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top", "font": {"size": 12}})
    if not any(len(trace.x) for trace in figure.data):
        figure.add_annotation(text="no candidate scored yet", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False,
                              font={"size": 18, "color": MUTED})
