"""The figures: each takes a loaded frame and returns a plotly Figure, usable alone in a notebook.

Every figure says above its axes on which model and hardware, and when, its numbers were made.
"""

import html
from collections.abc import Mapping
from pathlib import PurePath

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from analysis.candidates import SIZES, candidates, frontier, frontier_split, quality, quality_stderr, setting
from analysis.tables import describe_config, with_stderr
from raysearch.config import higher_is_better
from raysearch.units import human_bytes

INK, MUTED, GRID, BLUE, PALE, AMBER = "#1f2937", "#6b7280", "#e5e7eb", "#2563eb", "#aab2bf", "#d97706"
SIZE_NAMES = {"num_nonzero": "non-zero parameters", "stored_bytes": "stored bytes"}
STATUS_SYMBOLS = {"done": "circle", "stopped": "square", "failed": "x", "running": "triangle-right"}


def frontier_figure(frame: pd.DataFrame) -> go.Figure:
    """Size against the objective on the report split (selection while nothing is scored there), with buttons for the
    size: the frontier as a staircase with error bars of one standard error, the dense baseline as a line with a band
    of one standard error, all other candidates in grey. Candidates that were never scored on the report split are
    hollow and stand at their selection value."""
    split, objective = frontier_split(frame), setting(frame, "objective")
    figure = go.Figure()
    sizes = sorted(SIZES, key=lambda size: size != setting(frame, "size"))
    for size in sizes:
        for trace in _frontier_traces(frame, split, size):
            figure.add_trace(trace.update(visible=size == sizes[0], meta=size))
    _add_dense_band(figure, frame, split)
    _style(figure, frame)
    figure.update_xaxes(title_text=_size_title(sizes[0]), tickformat="~s")
    direction = "higher" if higher_is_better(objective) else "lower"
    figure.update_yaxes(title_text=f"{html.escape(objective)} ({direction} is better)")
    _limit_y(figure, frame, split)
    _add_buttons(figure, [(SIZE_NAMES[size], {"visible": [trace.meta == size for trace in figure.data]},
                           {"xaxis.title.text": _size_title(size)}) for size in sizes])
    return figure


def trajectory_figure(frame: pd.DataFrame) -> go.Figure:
    """The objective on the selection split along the rounds of every trial, from the dense baseline on; one colour
    per trial, and at its last finished round a marker for its status. Buttons: against sparsity, or rounds."""
    objective = setting(frame, "objective")
    rows = frame[quality(frame, "selection").notna()].sort_values(["trial", "round"])
    baseline, rows = rows[rows["status"] == "dense"], rows[rows["status"] != "dense"]
    start = [(0.0, float(value)) for value in baseline[f"selection/{objective}"]]  # of every path; empty without one
    numbers = sorted({int(trial) for trial in rows["trial"]})
    shades = sample_colorscale("Viridis", [0.92 * i / max(1, len(numbers) - 1) for i in range(len(numbers))])
    figure = go.Figure()
    paths: dict[str, list[list[float]]] = {"sparsity": [], "round": []}
    for number, shade in zip(numbers, shades):
        path = rows[rows["trial"] == number]
        for axis, of_trials in paths.items():
            of_trials.append([x for x, _ in start] + path[axis].astype(float).tolist())
        status = str(path["status"].iloc[-1])
        hover = [f"trial {number}: dense baseline" for _ in start]
        hover += [_hover(row, objective, f"trial {number}, round {row['round']} ({status})")
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
    _style(figure, frame)
    figure.update_xaxes(title_text="sparsity")
    figure.update_yaxes(title_text=f"{html.escape(objective)}, selection split")
    _limit_y(figure, frame, "selection")
    dummies: list[list[float | None]] = [[None] for _ in present]
    _add_buttons(figure, [(axis, {"x": [*paths[axis], *dummies]}, {"xaxis.title.text": axis}) for axis in paths])
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
    pool = candidates(frame)
    is_dense = pool["status"] == "dense"
    baseline, pool = pool[is_dense & quality(pool, split).notna()], pool[~is_dense]
    front = frontier(frame, split, size)
    rest = pool[~pool["key"].isin(front["key"])]
    scored = quality(rest, split).notna()
    staircase = {"mode": "lines+markers", "line": {"color": BLUE, "width": 2, "shape": "hv"},
                 "marker": {"color": BLUE, "size": 9, "line": {"color": "white", "width": 1.2}}}
    marker_size = 8 if len(rest) <= 150 else 5
    filled = {"mode": "markers", "marker": {"color": PALE, "size": marker_size}}
    diamond = {"mode": "markers", "marker": {"color": INK, "size": 11, "symbol": "diamond"}}
    hollow = {"mode": "markers", "marker": {"color": PALE, "size": marker_size, "symbol": "circle-open",
                                             "line": {"width": 1.4 if marker_size == 8 else 0.8}}}
    traces = [_trace(rest[~scored], "selection", size, "not on the frontier (selection value)", PALE, hollow)
              ] if split == "report" else []
    traces += [_trace(rest[scored], split, size, f"not on the frontier ({split} value)", PALE, filled),
               _trace(front, split, size, f"frontier ({split} split, ± 1 standard error)", BLUE, staircase),
               _trace(baseline, split, size, "dense baseline", INK, diamond)]
    return [trace for trace in traces if len(trace.x)]


def _trace(rows: pd.DataFrame, split: str, size: str, name: str, colour: str, look: Mapping[str, object]) -> go.Scatter:
    objective = setting(rows, "objective")
    hover = [_hover(row, objective, "dense baseline" if row["status"] == "dense" else
                    f"trial {row['trial']}, round {row['round']} ({row['status']})") for _, row in rows.iterrows()]
    return go.Scatter(
        x=rows[size].astype(float).tolist(), y=quality(rows, split).abs().tolist(), name=name, hovertext=hover,
        hoverinfo="text", error_y={"array": quality_stderr(rows, split).fillna(0).tolist(), "color": colour,
                                   "thickness": 1.2 if colour == BLUE else 0.6, "width": 3 if colour == BLUE else 0},
        **look)


def _hover(row: pd.Series, objective: str, title: str) -> str:
    """Lines of a hover box, escaped: plotly reads a little HTML in them."""
    lines = [f"<b>{html.escape(title)}</b>", html.escape(describe_config(row)),
             f"sparsity {row['sparsity']:.3f}, of the whole model {row['model_sparsity']:.3f}",
             f"{row['num_nonzero']:,} non-zero, {human_bytes(row['stored_bytes'])} stored"]
    for split in ("selection", "report"):
        value, stderr = (float(row[f"{split}/{objective}{end}"]) for end in ("", "_stderr"))
        if not np.isnan(value):
            lines.append(f"{html.escape(objective)} {with_stderr(value, stderr)} on {split}")
    if pd.notna(row["reason"]):
        reason = str(row["reason"])
        lines.append(f"<i>{html.escape(reason if len(reason) <= 90 else reason[:89] + '…')}</i>")
    return "<br>".join(lines)


def _add_dense_band(figure: go.Figure, frame: pd.DataFrame, split: str) -> None:
    for value, stderr in zip(quality(frame, split)[frame["status"] == "dense"].abs().dropna(),
                             quality_stderr(frame, split)[frame["status"] == "dense"].fillna(0)):
        figure.add_hrect(y0=value - stderr, y1=value + stderr, fillcolor=INK, opacity=0.07, line_width=0, layer="below")
        figure.add_hline(y=value, line={"color": INK, "width": 1.2, "dash": "dot"}, layer="below")


def _size_title(size: str) -> str:
    return f"{SIZE_NAMES[size]} (smaller is better)"


def _limit_y(figure: go.Figure, frame: pd.DataFrame, split: str) -> None:
    """Keeps a few ruined candidates from flattening the figure: where all values span more than three times the
    frontier's, the axis opens on the frontier, and a note says how many candidates lie outside."""
    pool = candidates(frame)
    shown = quality(pool, split).fillna(quality(pool, "selection")).abs().dropna()
    matter = pd.concat([quality(frontier(frame, split), split), quality(pool[pool["status"] == "dense"], split)])
    matter = matter.abs().dropna()
    if matter.empty or shown.max() - shown.min() <= 3 * (matter.max() - matter.min()):
        return
    pad = 0.15 * (matter.max() - matter.min()) or 0.05 * matter.max()
    low, high = matter.min() - pad, matter.max() + pad
    outside = int(((shown < low) | (shown > high)).sum())
    figure.update_yaxes(range=[low, high])
    if outside:
        figure.add_annotation(text=f"{outside} outside this view; double-click shows all", x=1, y=1, xref="paper",
                              yref="paper", xanchor="right", yanchor="top", showarrow=False,
                              font={"size": 11, "color": MUTED}, bgcolor="white")


def _add_buttons(figure: go.Figure, choices: list[tuple[str, dict[str, object], dict[str, object]]]) -> None:
    figure.update_layout(updatemenus=[{
        "type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
        "pad": {"t": 0, "b": 6}, "bgcolor": "white", "bordercolor": GRID, "font": {"size": 12}, "showactive": True,
        "buttons": [{"label": label, "method": "update", "args": [data, layout]} for label, data, layout in choices]}])


def _style(figure: go.Figure, frame: pd.DataFrame) -> None:
    axis = {"gridcolor": GRID, "linecolor": "#9ca3af", "zeroline": False, "ticks": "outside", "tickcolor": "#9ca3af",
            "ticklen": 4, "automargin": True, "title": {"standoff": 10, "font": {"size": 13}}}
    figure.update_layout(
        template="none", paper_bgcolor="white", plot_bgcolor="white", height=520, hovermode="closest",
        font={"family": "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif",
              "size": 13, "color": INK},
        hoverlabel={"bgcolor": "white", "bordercolor": GRID, "align": "left", "font": {"size": 12, "color": INK}},
        title={"text": html.escape(made_with(frame)), "x": 0, "xref": "paper", "xanchor": "left", "y": 1,
               "yref": "container", "yanchor": "top", "pad": {"t": 8}, "font": {"size": 12, "color": MUTED}},
        margin={"l": 60, "r": 16, "t": 76, "b": 90}, xaxis=axis, yaxis=axis,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top", "font": {"size": 12}})
    if not figure.data:
        figure.add_annotation(text="no candidate scored yet", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False,
                              font={"size": 18, "color": MUTED})
