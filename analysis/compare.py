"""Two candidates of a study side by side, by the items that both were scored on."""

from statistics import NormalDist

import numpy as np
import pandas as pd

from analysis.candidates import setting
from analysis.load import metric_names
from analysis.tables import aligned, with_stderr
from analysis.uncertainty import Draws, is_binary, paired, resample, whole_items
from raysearch.config import higher_is_better
from raysearch.pruning.pareto import Floats
from raysearch.study.ledger import Split

LEVEL = 0.95
POWER = 0.8
"""Probability of finding the difference that counts as detectable."""
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2) + NormalDist().inv_cdf(POWER)


def find(frame: pd.DataFrame, name: str) -> pd.Series:
    """The row of TRIAL/ROUND, such as 3/2, of a key or its beginning, or of "dense"; ValueError for none, several or a race."""
    trial, _, depth = name.partition("/")
    if name == "dense":
        rows = frame[frame["status"] == "dense"]
    elif trial.isdecimal() and depth.isdecimal():
        rows = frame[(frame["trial"] == int(trial)) & (frame["round"] == int(depth)) & frame["key"].notna()]
    else:
        rows = frame[frame["key"].str.startswith(name, na=False)].drop_duplicates("key") if name else frame.head(0)
    if len(rows) != 1:
        raise ValueError(f"{name!r} must name one finished round, got {len(rows) or 'none'} in {setting(frame, 'directory')}; "
                         "give TRIAL/ROUND such as 3/2, a key (`raysearch results DIR --format csv`), or dense")
    if pd.notna(rows["dominated_by"].iloc[0]):
        raise ValueError(f"{name} cannot be compared: a race ended its scoring, so it has part of the items; compare others")
    return rows.iloc[0]


def compare(frame: pd.DataFrame, one: str, other: str) -> pd.DataFrame:
    """One row per metric: `a` and `b` (values), `difference` = b - a in the metric's own unit, `low` and `high` of its LEVEL
    interval, `stderr` (paired) and `unpaired_stderr`, `better_probability` of b, `mcnemar` (p-value; accuracies of items that
    are their own documents, else NaN), `detectable` (the difference that as many items find with POWER), `num_items`,
    `num_clusters`, and `items_to_settle`: how many find a difference of this size with POWER (inf for 0).

    attrs holds "split": report where both were scored there, else selection. ValueError where nothing can be compared."""
    rows = pd.DataFrame([find(frame, one), find(frame, other)])
    if rows["key"].nunique() < 2:
        raise ValueError(f"{one} and {other} are one model ({rows['key'].iloc[0]}); compare two")
    split: Split = "report" if rows[f"report/{setting(frame, 'objective')}"].notna().all() else "selection"
    metrics = metric_names(rows, split)
    recorded = rows[[f"{split}/{metric}" for metric in metrics]].set_axis(metrics, axis=1).set_axis(rows["key"])
    found, reasons = [], []
    for metric, items in whole_items(setting(frame, "directory"), recorded, split).items():
        if len(items) < 2:
            reasons.append(f"{metric} has no items of both")
            continue
        try:
            found.append({"metric": metric, **compared(resample(metric, [items[key] for key in rows["key"]]))})
        except ValueError as error:
            reasons.append(str(error))
    if not found:
        raise ValueError(f"{one} and {other} cannot be compared on the {split} split: {'; '.join(reasons) or 'no metrics'}")
    table = pd.DataFrame(found)
    table.attrs.update(split=split, names=tuple(_name(row) for _, row in rows.iterrows()), left_out=tuple(reasons))
    return table


def describe_comparison(table: pd.DataFrame) -> str:
    """For a terminal, without a final newline."""
    names, split = table.attrs["names"], table.attrs["split"]
    chosen = "" if split == "report" else ", by which the search chose: the better one is flattered"
    cells = [[row["metric"], with_stderr(row["a"], np.nan), with_stderr(row["b"], np.nan), f"{row['difference']:+.4g}",
              f"{row['low']:+.4g} to {row['high']:+.4g}", f"{row['stderr']:.2g}", f"{row['unpaired_stderr']:.2g}",
              "" if np.isnan(row["mcnemar"]) else f"{row['mcnemar']:.2g}", f"{row['detectable']:.2g}", _count(row),
              "-" if np.isinf(row["items_to_settle"]) else f"{row['items_to_settle']:,.0f}", _verdict(row)]
             for _, row in table.iterrows()]
    header = ["metric", "a", "b", "b - a", f"{LEVEL:.0%} interval", "error", "unpaired", "McNemar", "detectable", "items",
              "to settle", "better"]
    lines = [f"a: {names[0]}", f"b: {names[1]}", f"{split} split{chosen}",
             aligned(header, cells, left=("metric", "better")).rstrip("\n"),
             "error: of b - a on the same items, resampled by documents; unpaired: as if each had items of its own",
             f"detectable: a difference that these items find in {POWER:.0%} of cases; to settle: items that find one as seen"]
    return "\n".join([*lines, *(f"left out: {reason}" for reason in table.attrs["left_out"])])


def compared(draws: Draws) -> dict[str, float]:
    """The columns of `compare`'s table for two candidates, a and b."""
    difference, drawn = paired(draws, 1, 0)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    stderr, num_items = float(drawn.std()), len(draws.numerator)
    better = drawn > 0 if higher_is_better(draws.metric) else drawn < 0
    independent = is_binary(draws) and draws.num_clusters == num_items
    return {"a": float(draws.value[0]), "b": float(draws.value[1]), "difference": difference, "low": float(low),
            "high": float(high), "stderr": stderr, "unpaired_stderr": float(np.hypot(*draws.stderr)),
            "better_probability": float(better.mean()), "mcnemar": mcnemar(draws.numerator) if independent else np.nan,
            "detectable": _Z * stderr, "num_items": num_items, "num_clusters": draws.num_clusters,
            "items_to_settle": num_items * (_Z * stderr / abs(difference)) ** 2 if difference else np.inf}


def mcnemar(right: Floats) -> float:
    """Two-sided p-value of McNemar's exact test (1947): right or wrong [n, 2] -> the binomial one of the items on which the two
    differ."""
    ahead, behind = int((right[:, 0] > right[:, 1]).sum()), int((right[:, 0] < right[:, 1]).sum())
    num_differ, term, tail = ahead + behind, 1, 0
    for k in range(min(ahead, behind) + 1):
        tail += term
        term = term * (num_differ - k) // (k + 1)
    return min(1.0, float(2 * tail / 2**num_differ))


def _count(row: pd.Series) -> str:
    return f"{row['num_items']:,}" + ("" if row["num_clusters"] == row["num_items"] else f" ({row['num_clusters']} docs)")


def _verdict(row: pd.Series) -> str:
    if row["low"] <= 0 <= row["high"]:
        return "open"
    return "b" if (row["difference"] > 0) == higher_is_better(row["metric"]) else "a"


def _name(row: pd.Series) -> str:
    if row["status"] == "other":
        return str(row["key"])
    return f"dense ({row['key']})" if row["status"] == "dense" else f"trial {row['trial']} round {row['round']} ({row['key']})"
