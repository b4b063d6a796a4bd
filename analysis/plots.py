"""The figures: each takes a loaded frame and returns a plotly Figure, usable alone in a notebook.

Every figure says above its axes on which model and hardware, and when, its numbers were made.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from textwrap import shorten, wrap

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from analysis.candidates import candidates, control_rows, frontier, frontier_bounds, frontier_split, quality, setting, sizes_of
from analysis.load import LATENCIES
from analysis.reproduce import trial_options
from analysis.tables import describe_config
from raysearch.config import higher_is_better
from raysearch.study.ledger import Split
from raysearch.study.records import OTHER

INK, MUTED, GRID, BLUE, PALE, AMBER, PINK = "#1f2937", "#6b7280", "#e5e7eb", "#2563eb", "#aab2bf", "#d97706", "#be185d"
SIZE_NAMES = {"num_nonzero": "non-zero parameters", "stored_bytes": "stored bytes", "resident_bytes": "resident bytes",
              "predicted_ms": "predicted ms of a batch", "decode_of_dense": "measured decoding time",
              "scoring_of_dense": "measured scoring time"}
"""The measured times are over those of the dense model."""
END_SYMBOLS = {"stopped": "square", "failed": "x", "running": "triangle-right"}
LEFT_PX = 84
MAX_DEPENDENCE = 6
"""Hyper-parameters whose levels are shown."""
NUM_COLOURED = 20
"""Trajectories that can be told from each other."""
Button = tuple[str, dict[str, object], dict[str, object]]
"""Label, what it changes in the traces, what it changes in the layout."""
Look = dict[str, object]
Floats32 = npt.NDArray[np.float32]


def frontier_figure(frame: pd.DataFrame, split: Split | None = None, texts: Mapping[int, str] | None = None) -> go.Figure:
    """Size against the objective on one split (None: `frontier_split`), with a button for each size, and for each time that was
    measured of some candidates, which then are the picture.

    Blue is the frontier, a staircase, in its simultaneous 95 % band, which the selection split loses once there is a report
    split, for it says nothing of values that were chosen by. Grey are all candidates that were scored; dense baseline and dense
    control are diamonds on dotted lines. The splits never share a picture: they hold different items, and one may be easier by
    more than the candidates differ. `customdata` of a point begins with trial and round; `texts`: of trial_texts."""
    split, column = split or frontier_split(frame), setting(frame, "objective")
    shown = sizes_of(frame)
    pool, trained = candidates(frame), control_rows(frame)
    pool, trained = pool[quality(pool, split).notna()], trained[quality(trained, split).notna()]
    made, baseline = pool[pool["status"] != "dense"], pool[pool["status"] == "dense"]
    bounds = frontier_bounds(frame, split) if split == frontier_split(frame) else {}
    texts = trial_texts(frame) if texts is None else texts
    dots = {"mode": "markers", "marker": {"color": PALE, "size": 8 if len(made) <= 150 else 5}}
    staircase = {"mode": "lines+markers", "line": {"color": BLUE, "width": 2, "shape": "hv"},
                 "marker": {"color": BLUE, "size": 9, "line": {"color": "white", "width": 1.2}}}
    fixed: list[tuple[pd.DataFrame, Look]] = [
        (made, {"name": "candidates", **dots}), (baseline, {"name": "dense baseline", **_diamond(INK)}),
        (trained, {"name": "dense control, trained as long", **_diamond(AMBER)})]
    added = frame[(frame["status"] == "other") & frame[f"{split}/{column}"].notna()]
    fixed += [(added[added["key"] == key], {"name": str(key).removeprefix(OTHER), **_diamond(PINK, "square")})
              for key in added["key"]]
    figure = go.Figure([_trace(rows, split, column, shown[0], texts, look) for rows, look in fixed])
    for size in shown:
        look = {"name": f"frontier ({split} split)", "meta": size, "visible": size == shown[0], **staircase}
        figure.add_traces([*_band(bounds.get(size), size, size == shown[0]),
                           _trace(frontier(frame, split, size), split, column, size, texts, look)])
    direction = "higher" if higher_is_better(column) else "lower"
    figure.update_layout({"shapes": [*_lines(baseline[f"{split}/{column}"], INK), *_lines(trained[f"{split}/{column}"], AMBER)],
                          "yaxis.title.text": f"{html.escape(column)}<br>{split} split ({direction} is better)",
                          **_limited_y(frame, split)})
    style(figure, frame)
    figure.update_xaxes(title_text=_size_title(shown[0]), tickformat=_size_format(shown[0]))
    own = [trace.x for trace in figure.data[len(fixed):]]
    _add_buttons(figure, [
        (SIZE_NAMES[size], {"x": [*(_numbers(rows[size]) for rows, _ in fixed), *own],
                            "visible": [trace.meta in (None, size) for trace in figure.data]},
         {"xaxis.title.text": _size_title(size), "xaxis.tickformat": _size_format(size), "xaxis.autorange": True})
        for size in shown])
    return figure


def trajectory_figure(frame: pd.DataFrame, texts: Mapping[int, str] | None = None) -> go.Figure:
    """The objective on the selection split along the rounds of every trial, from the dense baseline on: in colour (dark: early,
    light: late) the NUM_COLOURED with the most candidates on the frontier, in grey the others; a marker says how one ended that
    is not done. Buttons: against sparsity, or rounds."""
    column, texts = setting(frame, "objective"), trial_texts(frame) if texts is None else texts
    rows = frame[quality(frame, "selection").notna() & ~frame["status"].isin(["control", "other"])]
    rows = rows.sort_values(["trial", "round"])
    baseline, rows = rows[rows["status"] == "dense"], rows[rows["status"] != "dense"]
    on_front = rows.loc[rows["key"].isin(frontier(frame, "selection")["key"]), "trial"].value_counts(sort=False)
    numbers = sorted(map(int, on_front.sort_values(ascending=False, kind="stable").index[:NUM_COLOURED]))
    # the last 8 % of Viridis is a yellow that white paper swallows
    shades = sample_colorscale("Viridis", [0.92 * i / max(1, len(numbers) - 1) for i in range(len(numbers))])
    ends = rows.groupby("trial").tail(1)
    paths = _paths(rows, baseline, column)
    groups: list[tuple[pd.DataFrame, Look]] = [(paths[~paths["trial"].isin(numbers)], {
        "name": "other trials", "mode": "lines", "line": {"color": PALE, "width": 1}, "opacity": 0.5,
        "hoverinfo": "skip"})]
    groups += [(paths[paths["trial"] == number], {
        "name": f"trial {number}", "mode": "lines+markers", "line": {"color": shade, "width": 2}, "marker": {"size": 5},
        "showlegend": False}) for number, shade in zip(numbers, shades)]
    groups += [(ends[ends["status"] == status], {
        "name": f"ended {status}".replace("ended running", "still running"), "mode": "markers",
        "marker": {"symbol": symbol, "size": 8, "color": INK, "opacity": 0.6}})
        for status, symbol in END_SYMBOLS.items() if (ends["status"] == status).any()]
    figure = go.Figure([_trace(path, "selection", column, "sparsity", texts, look) for path, look in groups])
    figure.update_layout(_limited_y(frame, "selection"))
    style(figure, frame)
    figure.update_xaxes(title_text="sparsity")
    figure.update_yaxes(title_text=f"{html.escape(column)}, selection split")
    _add_buttons(figure, [(axis, {"x": [_numbers(path[axis]) for path, _ in groups]}, {"xaxis.title.text": axis})
                          for axis in ("sparsity", "round")])
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
    style(figure, frame)
    figure.update_layout(height=150 + 34 * len(table), bargap=0.4, margin_t=36)
    figure.update_xaxes(title_text="share of variance explained", tickformat=".0%",
                        range=[0, max(0.05, 1.08 * float(table[["share", "chance"]].to_numpy().max()))])
    figure.update_yaxes(showgrid=False)
    return figure


def dependence_figure(table: pd.DataFrame, effects: pd.DataFrame, frame: pd.DataFrame) -> go.Figure:
    """`analysis.importance.dependence` of the MAX_DEPENDENCE most important of `table` (`importance`): by level, in its order,
    the mean at equal size with two standard errors; grey as in `importance_figure`."""
    ticks: list[str] = []
    columns: dict[str, list[object]] = {"x": [], "y": [], "error": [], "color": [], "hovertext": []}
    for _, row in table.head(MAX_DEPENDENCE).iterrows():
        ticks.append(f"<b>{row['hyperparameter']}</b>")
        for _, level in effects[effects["hyperparameter"] == row["hyperparameter"]].iterrows():
            error = "of one trial" if pd.isna(level["stderr"]) else f"± {2 * level['stderr']:.1%}"
            values = (level["effect"], len(ticks), 0.0 if pd.isna(level["stderr"]) else 2 * level["stderr"],
                      BLUE if row["share"] > row["chance"] else "#94a3b8",
                      f"{row['hyperparameter']} {html.escape(level['level'])}: {level['effect']:+.1%} {error}<br>"
                      f"{level['num_candidates']} candidates of {level['num_trials']} trials")
            for column, value in zip(columns.values(), values):
                column.append(value)
            ticks.append(html.escape(level["level"]))
    figure = go.Figure(go.Scatter(
        x=columns["x"], y=np.array(columns["y"]), mode="markers", marker={"size": 9, "color": columns["color"]},
        showlegend=False, hovertext=columns["hovertext"], hoverinfo="text",
        error_x={"array": columns["error"], "color": MUTED, "thickness": 1.4, "width": 3}))
    style(figure, frame)
    figure.add_vline(x=0, line={"color": INK, "width": 1.2, "dash": "dot"})
    figure.update_layout(height=120 + 22 * len(ticks), margin_t=36, margin_b=64)
    figure.update_xaxes(title_text="ahead at equal size (right is better)", tickformat="+.0%", nticks=6, title_font_size=12)
    figure.update_yaxes(tickvals=list(range(len(ticks))), ticktext=ticks, range=[len(ticks) - 0.5, -0.5])
    return figure


def trial_texts(frame: pd.DataFrame) -> dict[int, str]:
    """Of each trial, what a hover box says of it, escaped, for plotly reads a little HTML there: the options with which
    `raysearch prune` runs it again, in lines, and in italics how it ended where it is not done."""
    texts = {}
    for row in frame[frame["trial"].notna()].drop_duplicates("trial").to_dict("records"):
        asked = wrap(trial_options(row) or describe_config(row), 60, break_long_words=False, break_on_hyphens=False)
        reason = "" if pd.isna(row["reason"]) else f": {shorten(str(row['reason']), 90, placeholder=' …')}"
        ended = "" if row["status"] == "done" else f"<br><i>{html.escape(row['status'] + reason)}</i>"
        texts[int(row["trial"])] = "<br>".join(map(html.escape, asked)) + ended
    return texts


def _trace(rows: pd.DataFrame, split: str, column: str, x: str, texts: Mapping[int, str], look: Look) -> go.Scatter:
    """Of the metric `column` against the column `x`. Plotly puts the hover box together, so that a page of thousands of
    candidates holds each number once."""
    xy = {"x": _numbers(rows[x]), "y": _numbers(rows[f"{split}/{column}"])}
    if "hoverinfo" in look:
        return go.Scatter(**xy, **look)
    ours = rows["trial"].notna().any()
    numbers = rows[["trial", "round", "sparsity"]].astype("float32").fillna(0).to_numpy(dtype=np.float32)
    title = "trial %{customdata[0]}, round %{customdata[1]}" if ours else str(look["name"])
    return go.Scatter(
        **xy, customdata=numbers, text=[texts.get(int(trial)) for trial in numbers[:, 0]] if ours else None,
        hovertemplate=f"<b>{title}</b>: sparsity %{{customdata[2]:.3f}}<br>{html.escape(column)} %{{y:.5~g}} on the {split} "
                      f"split{'<br>%{text}' if ours else ''}<extra></extra>", **look)


def _numbers(column: pd.Series) -> Floats32:
    """In single precision: a page holds them in half the bytes."""
    return column.to_numpy(dtype=np.float32, na_value=np.nan)


def _paths(rows: pd.DataFrame, baseline: pd.DataFrame, column: str) -> pd.DataFrame:
    """What `_trace` needs of the rounds of each trial, behind the dense baseline or the candidate that a fork goes on from, and
    a gap that parts it from another trial."""
    needed = ["round", "sparsity", f"selection/{column}"]
    starts = rows.drop_duplicates("trial")[["trial", "forked_from"]].astype({"forked_from": "object"})
    names = "trial " + rows["trial"].astype(str) + " round " + rows["round"].astype(str)
    parents = rows[needed].assign(forked_from=names.astype("object"))
    forks = starts.merge(parents, on="forked_from")
    begun = pd.concat([starts[~starts["trial"].isin(forks["trial"])].merge(baseline[needed], how="cross"), forks])
    path = pd.concat([starts.assign(round=-1), begun, rows[["trial", *needed]]]).sort_values(["trial", "round"])
    return path.assign(round=path["round"].clip(lower=0))


def _band(bounds: pd.DataFrame | None, size: str, visible: bool) -> list[go.Scatter]:
    """Two traces, none without bounds: the lower end, and the upper one filled down to it."""
    if bounds is None:
        return []
    look = {"mode": "lines", "line": {"width": 0, "shape": "hv"}, "hoverinfo": "skip", "meta": size, "visible": visible}
    return [go.Scatter(x=_numbers(bounds[size]), y=_numbers(bounds["low"]), showlegend=False, **look),
            go.Scatter(x=_numbers(bounds[size]), y=_numbers(bounds["high"]), fill="tonexty", fillcolor="rgba(37,99,235,.15)",
                       name="95 % band of the frontier", **look)]


def _lines(values: pd.Series, colour: str) -> list[dict[str, object]]:
    return [{"type": "line", "y0": value, "y1": value, "line": {"color": colour, "width": 1.2, "dash": "dot"}, "xref": "paper",
             "x0": 0, "x1": 1, "layer": "below"} for value in values]


def _diamond(colour: str, symbol: str = "diamond") -> Look:
    return {"mode": "markers", "marker": {"color": colour, "size": 11, "symbol": symbol}}


def _size_title(size: str) -> str:
    return f"{SIZE_NAMES[size]} (smaller is better)"


def _size_format(size: str) -> str:
    return "~g" if size in ("predicted_ms", *LATENCIES) else "~s"


def limited(frame: pd.DataFrame, split: str) -> tuple[float, float] | None:
    """(low, high) of the objective, so that a few ruined candidates do not flatten a figure: where the values on `split` span
    more than three times those of its frontiers (by each size), dense baseline and dense control, these; else None."""
    pool = candidates(frame)
    values = quality(pool, split).abs()
    on_frontier = {key for size in sizes_of(frame) for key in frontier(frame, split, size)["key"]}
    matter = values[pool["key"].isin(on_frontier) | (pool["status"] == "dense")].dropna()
    matter = pd.concat([matter, quality(control_rows(frame), split).abs().dropna()])
    if matter.empty or values.max() - values.min() <= 3 * (matter.max() - matter.min()):
        return None
    pad = 0.15 * (matter.max() - matter.min()) or 0.05 * matter.max()
    return float(matter.min() - pad), float(matter.max() + pad)


def _limited_y(frame: pd.DataFrame, split: str) -> dict[str, object]:
    """Layout whose axis opens on `limited`, with a note that counts the candidates outside."""
    if (ends := limited(frame, split)) is None:
        return {"yaxis.autorange": True, "annotations": []}
    values = quality(candidates(frame), split).abs()
    num_outside = int(((values < ends[0]) | (values > ends[1])).sum())
    note = {"text": f"{num_outside} outside this view; double-click shows all", "x": 1, "y": 1, "xref": "paper",
            "yref": "paper", "xanchor": "right", "yanchor": "top", "showarrow": False,
            "font": {"size": 11, "color": MUTED}, "bgcolor": "white"}
    return {"yaxis.autorange": False, "yaxis.range": list(ends), "annotations": [note] if num_outside else []}


def _add_buttons(figure: go.Figure, buttons: Sequence[Button]) -> None:
    """Above the axes; the first one is what the figure opens with. The page draws them outside, where they wrap."""
    figure.update_layout(updatemenus=[{
        "type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
        "pad": {"l": -LEFT_PX, "b": 6}, "bgcolor": "white", "bordercolor": GRID, "font": {"size": 12}, "showactive": True,
        "buttons": [{"label": label, "method": "update", "args": [traces, layout]} for label, traces, layout in buttons]}])


def style(figure: go.Figure, frame: pd.DataFrame) -> None:
    """The house's look, with the model, hardware and day of the frame above the axes."""
    made_with = f"{PurePath(setting(frame, 'model')).name} · {setting(frame, 'device')} · {setting(frame, 'created_at')[:10]}"
    axis = {"gridcolor": GRID, "linecolor": "#9ca3af", "zeroline": False, "ticks": "outside", "tickcolor": "#9ca3af",
            "ticklen": 4, "automargin": True, "title": {"standoff": 10, "font": {"size": 13}}}
    figure.update_layout(
        template="none", paper_bgcolor="white", plot_bgcolor="white", height=520, hovermode="closest",
        font={"family": "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif",
              "size": 13, "color": INK},
        hoverlabel={"bgcolor": "white", "bordercolor": GRID, "align": "left", "font": {"size": 12, "color": INK}},
        title={"text": html.escape(made_with), "x": 0, "xref": "container", "xanchor": "left", "y": 1,
               "yref": "container", "yanchor": "top", "pad": {"t": 8}, "font": {"size": 11, "color": MUTED}},
        margin={"l": LEFT_PX, "r": 16, "t": 76, "b": 90}, xaxis=axis, yaxis=axis,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top", "font": {"size": 12}})
    if not any(pd.notna(trace.y).any() for trace in figure.data if len(trace.y)):
        figure.add_annotation(text="no candidate scored yet", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False,
                              font={"size": 18, "color": MUTED})
