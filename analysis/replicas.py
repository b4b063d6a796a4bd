"""How far a candidate's numbers spread over seeds, beside how far they would over items."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.candidates import setting
from analysis.compare import compare, find
from analysis.tables import aligned, with_stderr
from raysearch.config import Metric


def spread(frame: pd.DataFrame, key: str, replicas: Sequence[Mapping[str, Metric]]) -> pd.DataFrame:
    """One row per metric of the report split: `dense`, `picked`, `mean` and `seeds` (standard deviation, n - 1) of the n
    replicas alone, since the picked one was chosen among many and is no fair draw; `items`, the paired error of picked - dense;
    `both`, sqrt(seeds^2 + items^2): that of one candidate of another seed on other items, a little too large, for `items` holds
    what a seed does to single items too. NaN where a metric has no items.

    attrs holds "num_seeds" and "left_out" (reasons). ValueError for fewer than two replicas."""
    if len(replicas) < 2:
        raise ValueError(f"a spread needs at least 2 seeds whose rounds finished, got {len(replicas)}; give more --seeds")
    dense, picked, left_out = find(frame, "dense"), find(frame, key), []
    try:
        table = compare(frame, "dense", key)
        errors, left_out = table.set_index("metric")["stderr"].to_dict(), list(table.attrs["left_out"])
    except ValueError as error:  # items of few documents
        errors, left_out = {}, [str(error)]
    rows = []
    for metric in sorted(set.intersection(*(set(each) for each in replicas))):
        values, items = [each[metric].value for each in replicas], errors.get(metric, np.nan)
        seeds = float(np.std(values, ddof=1))
        rows.append({"metric": metric, "dense": dense[f"report/{metric}"], "picked": picked[f"report/{metric}"],
                     "mean": float(np.mean(values)), "seeds": seeds, "items": items, "both": float(np.hypot(seeds, items))})
    table = pd.DataFrame(rows)
    table.attrs.update(num_seeds=len(replicas), left_out=left_out, directory=setting(frame, "directory"))
    return table


def describe_spread(table: pd.DataFrame) -> str:
    """For a terminal, without a final newline."""
    num_seeds = table.attrs["num_seeds"]
    cells = [[row["metric"], *(with_stderr(row[name], np.nan) for name in ("dense", "picked", "mean")),
              *("-" if np.isnan(row[name]) else f"{row[name]:.2g}" for name in ("seeds", "items", "both"))]
             for _, row in table.iterrows()]
    lines = [aligned(["report split", "dense", "picked", "other seeds", "seeds", "items", "both"], cells,
                     left=("report split",)).rstrip("\n"),
             f"other seeds: their mean; seeds: their standard deviation, of {num_seeds} known to about "
             f"{1 / np.sqrt(2 * (num_seeds - 1)):.0%}",
             "items: standard error of picked - dense on the same items; both: of a candidate of another seed, on other items"]
    return "\n".join([*lines, *(f"no error over items: {reason}" for reason in table.attrs["left_out"])])
