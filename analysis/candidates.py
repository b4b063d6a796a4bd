"""Which rows of a loaded frame are candidates, how good they are, and which are on the frontier."""

import numpy as np
import pandas as pd

from analysis.load import LATENCIES, metric_names
from analysis.uncertainty import (
    NUM_DRAWS,
    Draws,
    front_share,
    frontier_band,
    hypervolume_interval,
    paired,
    resample,
    whole_items,
)
from raysearch import config
from raysearch.config import higher_is_better, is_maximised
from raysearch.pruning.pareto import Bools, Floats, hypervolume, knee, non_dominated
from raysearch.study.ledger import Split

MOST_PAIRED = 100
"""Rows whose items are read for the error of what they lose."""
FAR = 5.0
"""Standard errors, of each of two candidates, behind which no resample brings the one before the other."""


def setting(frame: pd.DataFrame, name: str) -> str:
    """`frame.attrs[name]` ("directory", "model", "objective", ...); ValueError where pandas lost it."""
    if name not in frame.attrs:
        raise ValueError(f"frame must carry attrs[{name!r}] (analysis.load.load sets it), got {list(frame.attrs)}; "
                         "copy attrs after a concat or merge")
    return str(frame.attrs[name])


def candidates(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with a model of their own, the dense baseline included: no aliases, no trials without a finished round, no
    dense control, which is a baseline too and the same size, and no model of another origin."""
    return frame[frame["key"].notna() & ~frame["is_alias"] & ~frame["status"].isin(["control", "other"])]


def pruned(frame: pd.DataFrame) -> pd.DataFrame:
    """The candidates but for the dense baseline."""
    pool = candidates(frame)
    return pool[pool["status"] != "dense"]


def dense(frame: pd.DataFrame) -> pd.Series | None:
    """The dense baseline's row, or None while it is not evaluated."""
    rows = frame[frame["status"] == "dense"]
    return None if rows.empty else rows.iloc[0]


def control_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The last row of the dense control, or no row while none was trained as long as the candidate that was trained longest:
    one that is not finished, or that a longer trial has outgrown, is no measure of the candidates."""
    rows = frame[(frame["status"] == "control") & frame["key"].notna()].sort_values(["trained_tokens", "key"])
    longest = candidates(frame)["trained_tokens"].max()
    return rows.tail(1) if len(rows) and pd.notna(longest) and rows["trained_tokens"].iloc[-1] >= longest else rows.head(0)


def control(frame: pd.DataFrame) -> pd.Series | None:
    """The row of `control_rows`, or None."""
    rows = control_rows(frame)
    return None if rows.empty else rows.iloc[0]


def loss(rows: pd.DataFrame, reference: pd.Series, split: str) -> pd.Series:
    """What each row loses against `reference` in the objective's unit, positive when worse."""
    objective = setting(rows, "objective")
    return float(reference[f"{split}/{objective}"]) * (1 if higher_is_better(objective) else -1) - quality(rows, split)


def losses(rows: pd.DataFrame, reference: pd.Series, split: str) -> tuple[pd.Series, pd.Series]:
    """(`loss`, its standard error): of paired differences where the items of both are known, of up to MOST_PAIRED rows; else
    as if the two scores were independent: they share their items, so the true one is usually smaller."""
    column = f"{split}/{setting(rows, 'objective')}"
    stderr = 0.0 if pd.isna(reference[f"{column}_stderr"]) else float(reference[f"{column}_stderr"])
    noise = (quality_stderr(rows, split).fillna(0) ** 2 + stderr**2) ** 0.5
    if 0 < len(rows) <= MOST_PAIRED:
        both = pd.concat([rows, reference.to_frame().T])
        if (found := _apart(both, str(reference["key"]), "report" if split == "report" else "selection")) is not None:
            keys, _, apart = found
            of_pairs = {key: float(each.std()) for key, each in zip(keys, apart.T) if key != reference["key"]}
            noise = rows["key"].map(of_pairs).fillna(noise).astype(float)
    return loss(rows, reference, split), noise


def _apart(rows: pd.DataFrame, reference: str, split: Split) -> tuple[list[str], Draws, Floats] | None:
    """(keys of the k rows whose items are known, draws of their objective, those of the paired differences from the row with
    the key `reference` [b, k]); None without its items, and for items of few documents, where no error is known."""
    objective = setting(rows, "objective")
    recorded = rows.drop_duplicates("key").set_index("key")[[f"{split}/{objective}"]].dropna().set_axis([objective], axis=1)
    items = whole_items(setting(rows, "directory"), recorded, split)[objective]
    if reference not in items:
        return None
    try:
        draws = resample(objective, list(items.values()))
    except ValueError:
        return None
    root = list(items).index(reference)
    return list(items), draws, np.column_stack([paired(draws, i, root)[1] for i in range(len(items))])


def frontier_split(frame: pd.DataFrame) -> Split:
    """The split that the frontier is drawn on: "report" once a candidate has the objective there, else "selection"."""
    return "report" if setting(frame, "objective") in metric_names(pruned(frame), "report") else "selection"


def sizes_of(frame: pd.DataFrame) -> list[str]:
    """The columns by which candidates can be small, the study's own first: the sizes and measured times that some have."""
    first, pool = setting(frame, "size"), candidates(frame)
    return [first, *(name for name in (*config.SIZES, *LATENCIES) if name != first and pool[name].notna().any())]


def quality(frame: pd.DataFrame, split: str) -> pd.Series:
    """The objective on `split` with the sign that makes higher better; NaN where it was not scored, or on some
    items only because a race stopped it."""
    objective = setting(frame, "objective")
    values = frame[f"{split}/{objective}"].where(frame["dominated_by"].isna())
    return values if higher_is_better(objective) else -values


def quality_stderr(frame: pd.DataFrame, split: str) -> pd.Series:
    """Standard error of `quality`; NaN where unknown."""
    return frame[f"{split}/{setting(frame, 'objective')}_stderr"]


def frontier(frame: pd.DataFrame, split: str | None = None, size: str | None = None) -> pd.DataFrame:
    """The non-dominated candidates on `split`, smallest first.

    `split` None is `frontier_split(frame)`, `size` None is the study's; it may be any of `sizes_of`. The dense baseline takes
    part, so a candidate must be smaller or better than it; one whose scoring a race stopped does not. On the report split only
    candidates that were scored there take part: those that the sweep found on the frontier of the selection split."""
    split, size = split or frontier_split(frame), size or setting(frame, "size")
    pool = candidates(frame)
    values = _objectives(frame, pool, split, size)
    on_front = non_dominated(values.to_numpy(), [is_maximised(str(name)) for name in values])
    return pool[on_front].sort_values([size, "key"])


def front_probability(frame: pd.DataFrame, split: Split) -> pd.Series:
    """Share of `NUM_DRAWS` resamples of the items in which each of the scored candidates is on the frontier of `split`; 0 for
    those that are far behind it; NaN where an objective's items are not known. Indexed as `frame`."""
    pool = candidates(frame)
    scored = _objectives(frame, pool, split, setting(frame, "size")).dropna().index
    near, drawn, known = _resampled(frame, split)
    share = front_share(drawn, [is_maximised(str(name)) for name in near])
    return pd.Series(share, index=near.index).where(known).reindex(scored.union(near.index)).fillna(
        pd.Series(0.0, index=scored.difference(near.index)))


def frontier_bounds(frame: pd.DataFrame, split: Split) -> dict[str, pd.DataFrame]:
    """By size: columns size, low and high, sorted by size: between these, all at once at 95 %, is the true best of candidates
    that are no larger, if dense is worth what it scored (uncertainty.frontier_band of paired differences, better known than
    values). Of dense and of what is not far behind the frontier by some size; {} where items are not known."""
    pool, objective, baseline = candidates(frame), setting(frame, "objective"), dense(frame)
    near = pd.Series(False, index=pool.index)
    for size in sizes_of(frame):
        values = _objectives(frame, pool, split, size).dropna()
        near[values.index] |= _within_reach(pool.loc[values.index], values, split)
    rows = pool[near | (pool["status"] == "dense")]
    if baseline is None or (found := _apart(rows, str(baseline["key"]), split)) is None:
        return {}
    keys, draws, apart = found
    draws, rows = draws._replace(drawn=draws.value[keys.index(baseline["key"])] + apart), rows.set_index("key")
    bounds, sign = {}, 1 if higher_is_better(objective) else -1
    for size in sizes_of(frame):
        sizes = rows.loc[keys, size].astype(float)
        has_one = sizes.notna().to_numpy()
        of_those = draws._replace(value=draws.value[has_one], drawn=draws.drawn[:, has_one])
        ends = np.column_stack(frontier_band(sizes := sizes[has_one], of_those)) * sign
        bounds[size] = pd.DataFrame({size: sizes, "low": ends.min(axis=1), "high": ends.max(axis=1)}).sort_values(size)
    return bounds


def _resampled(frame: pd.DataFrame, split: Split) -> tuple[pd.DataFrame, Floats, Bools]:
    """(objectives of dense and of the k scored candidates that are not far behind the frontier, their draws [b, k, d], whether
    their items are known [k]). Items of the others are not read: a study may have thousands."""
    pool = candidates(frame)
    values = _objectives(frame, pool, split, setting(frame, "size")).dropna()
    pool = pool.loc[values.index]
    values = values[_within_reach(pool, values, split) | (pool["status"] == "dense")]
    keys, known = pd.Index(pool["key"][values.index]), np.ones(len(values), dtype=np.bool_)
    drawn = np.tile(values.to_numpy(), (NUM_DRAWS, 1, 1))
    qualities = values.drop(columns=[name for name in values if "/" not in str(name)]).set_axis(keys)
    for metric, items in whole_items(setting(frame, "directory"), qualities, split).items():
        try:
            draws = resample(metric, list(items.values()))
        except ValueError:  # no items, or those of few documents: no error is known
            return values, drawn, np.zeros_like(known)
        known &= keys.isin(items)
        drawn[:, keys.get_indexer(list(items)), values.columns.get_loc(metric)] = draws.drawn
    return values, drawn, known


def _within_reach(pool: pd.DataFrame, values: pd.DataFrame, split: str) -> Bools:
    """Which candidates no other one dominates by more than FAR standard errors of both: (n,)."""
    errors = pd.DataFrame({name: 0.0 if "/" not in name else pool[f"{split}/{name}_stderr"].fillna(np.inf)
                           for name in map(str, values)}, index=values.index)
    lower = np.where([is_maximised(str(name)) for name in values], -values, values)
    surely, at_best = (np.asarray(lower + sign * FAR * errors.to_numpy()) for sign in (1, -1))
    reach = np.ones(len(lower), dtype=np.bool_)
    for point in surely[non_dominated(surely, [False] * lower.shape[1])]:
        reach &= ~((point <= at_best).all(axis=1) & (point < at_best).any(axis=1))
    return reach


def _objectives(frame: pd.DataFrame, pool: pd.DataFrame, split: str, size: str) -> pd.DataFrame:
    """A column for each of the study's objectives, `size` in the place of its first size; NaN where a race stopped."""
    names = [size if name == setting(frame, "size") else name for name in frame.attrs["objectives"]]
    whole = pool["dominated_by"].isna()
    return pd.DataFrame({name: (pool[name] if "/" not in name else pool[f"{split}/{name}"].where(whole)).astype("float64")
                         for name in names})


def knee_of(frame: pd.DataFrame, split: Split) -> pd.Series | None:
    """The candidate where the frontier bends most (pareto.knee), or None where it does not."""
    values = _objectives(frame, front := frontier(frame, split), split, setting(frame, "size"))
    position = knee(values.to_numpy(), [is_maximised(str(name)) for name in values])
    return None if position is None else front.iloc[position]


def relative_hypervolume(frame: pd.DataFrame, split: str | None = None) -> float:
    """Hypervolume in units of the dense baseline, reference (1, 0): x is size / dense size, y is value / dense value
    for accuracies and dense value / value where lower is better. So 0 is nothing, and half the size at the dense
    baseline's quality alone makes 0.5; no arbitrary reference point. NaN without a scored baseline."""
    points = relative_points(frame, candidates(frame), split or frontier_split(frame))
    return float("nan") if points is None else hypervolume(points, (False, True), (1.0, 0.0))


def relative_points(frame: pd.DataFrame, rows: pd.DataFrame, split: str) -> Floats | None:
    """[n, 2]: sizes and qualities of rows of the frame in units of its dense baseline; None without a scored one."""
    baseline, size = dense(frame), setting(frame, "size")
    if baseline is None or np.isnan(of_dense := abs(float(baseline[f"{split}/{setting(frame, 'objective')}"]))) or not of_dense:
        return None  # 0 is an accuracy's
    values = quality(rows, split).abs().to_numpy()
    relative = values / of_dense if higher_is_better(setting(frame, "objective")) else of_dense / values
    return np.column_stack([rows[size].to_numpy(dtype=float) / float(baseline[size]), relative])


def relative_hypervolume_interval(frame: pd.DataFrame, split: Split) -> tuple[float, float]:
    """(low, high) of `relative_hypervolume` on other items, at 95 %; NaN where the items of dense are not known."""
    baseline, size, objective = dense(frame), setting(frame, "size"), setting(frame, "objective")
    values, drawn, known = _resampled(frame, split)
    if baseline is None or not known[values.index == baseline.name].any():
        return float("nan"), float("nan")
    of_metric = np.vstack([values[objective].to_numpy(), drawn[:, :, values.columns.get_loc(objective)]])  # [1 + b, k]
    of_dense = of_metric[:, values.index == baseline.name]
    relative = of_metric / of_dense if higher_is_better(objective) else of_dense / of_metric
    return hypervolume_interval(values[size] / float(baseline[size]), relative[0], relative[1:], (1.0, 0.0))
