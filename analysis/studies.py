"""Several studies side by side, each in units of its own dense baseline, so that models and splits may differ."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative

from analysis.candidates import dense, frontier, frontier_split, pruned, quality, relative_hypervolume, relative_points, setting
from analysis.candidates import relative_hypervolume_interval as interval
from analysis.plots import AMBER, BLUE, PINK, style
from raysearch.config import higher_is_better
from raysearch.pruning.pareto import hypervolume

NUM_POINTS = 50


def compare_studies(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per study, by its name: `model`, `objective`, `split`, `dense` (the baseline's value), `trials`, `failed`,
    `candidates`, `on_frontier`, `hours` of computing, `hypervolume` relative to dense with `low` and `high` at 95 % on other
    items, and `within_1_percent`: the smallest share of dense's size that is within 1 % of its objective. NaN where nothing is
    scored."""
    rows = []
    for name, frame in frames.items():
        split, objective, size = frontier_split(frame), setting(frame, "objective"), setting(frame, "size")
        baseline, front, made = dense(frame), frontier(frame), pruned(frame)
        trials = frame.dropna(subset=["trial"]).drop_duplicates("trial")["status"]
        value = float("nan") if baseline is None else float(baseline[f"{split}/{objective}"])
        near = front[quality(front, split) >= (1 if higher_is_better(objective) else -1) * value - 0.01 * abs(value)]
        low, high = interval(frame, split) if baseline is not None else (float("nan"), float("nan"))
        rows.append({
            "study": name, "model": setting(frame, "model"), "objective": objective, "split": split, "dense": value,
            "trials": len(trials), "failed": int((trials == "failed").sum()), "candidates": len(made),
            "on_frontier": int((front["status"] != "dense").sum()),
            "hours": float(frame.loc[~frame["is_alias"], "seconds"].sum()) / 3600,
            "hypervolume": relative_hypervolume(frame), "low": low, "high": high,
            "within_1_percent": float("nan") if near.empty or baseline is None else float(near[size].min() / baseline[size])})
    return pd.DataFrame(rows).set_index("study")


def relative_frontier(frame: pd.DataFrame) -> pd.DataFrame:
    """The frontier, smallest first, in units of the dense baseline: columns `size` and `quality`, of which more is better."""
    points = relative_points(frame, frontier(frame), frontier_split(frame))
    return pd.DataFrame(np.empty((0, 2)) if points is None else points, columns=["size", "quality"])


def hypervolume_over_time(frame: pd.DataFrame, num_points: int = NUM_POINTS) -> pd.DataFrame:
    """Columns `hours` of computing spent and the `hypervolume` of the selection split by then, relative to dense: at NUM_POINTS
    moments, as if trials had run one after the other in the order of their numbers."""
    order = frame[((frame["status"] == "dense") | frame["trial"].notna()) & frame["key"].notna()]
    order = order[~order["is_alias"]].sort_values(["trial", "round"], na_position="first")
    hours, points = order["seconds"].fillna(0).cumsum().to_numpy(dtype=float) / 3600, relative_points(frame, order, "selection")
    ends = [] if points is None else sorted({int(i) for i in np.linspace(1, len(order), min(num_points, len(order)))})
    volumes = [hypervolume(points[:end], (False, True), (1.0, 0.0)) for end in ends] if points is not None else []
    return pd.DataFrame({"hours": [hours[end - 1] for end in ends], "hypervolume": volumes})


def studies_figure(frames: Mapping[str, pd.DataFrame]) -> go.Figure:
    """The relative frontiers of studies in one picture."""
    drawn = {name: relative_frontier(frame) for name, frame in frames.items()}
    figure = _lines({name: (rows["size"], rows["quality"]) for name, rows in drawn.items()}, list(frames.values()))
    figure.update_xaxes(title_text="size, of dense (smaller is better)", tickformat=".0%")
    figure.update_yaxes(title_text="quality, of dense (higher is better)", tickformat=".1%")
    return figure


def progress_figure(frames: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Hypervolume over the hours spent."""
    drawn = {name: hypervolume_over_time(frame) for name, frame in frames.items()}
    figure = _lines({name: (rows["hours"], rows["hypervolume"]) for name, rows in drawn.items()}, list(frames.values()))
    figure.update_xaxes(title_text="hours of computing")
    figure.update_yaxes(title_text="hypervolume, selection split")
    return figure


def _lines(drawn: Mapping[str, tuple[pd.Series, pd.Series]], frames: Sequence[pd.DataFrame]) -> go.Figure:
    look = {"mode": "lines+markers", "marker": {"size": 5}, "line": {"shape": "hv"}}
    figure = go.Figure([go.Scatter(x=x.to_numpy(), y=y.to_numpy(), name=name, **look) for name, (x, y) in drawn.items()])
    figure.update_layout(colorway=[BLUE, AMBER, PINK, *qualitative.Safe])
    style(figure, frames[0])
    return figure
