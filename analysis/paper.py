"""The tables of "Can pruning make large language models more efficient?" (Gholami and Omar 2023, arXiv 2310.04573), with ours.

Its GPT-Efficio of 950 M parameters is not published, nor its text, its number of shots or its prompts, so values are not
comparable. What can be compared is what each model loses against its own dense one.
"""

import math
from typing import Any

import pandas as pd

from analysis.candidates import dense, frontier, pruned, quality, setting
from analysis.compare import compare
from analysis.tables import aligned
from raysearch.units import human_count

RATES = (0.1, 0.3, 0.5)
NEAR = 0.05
"""A candidate stands for a rate where its share of zeros, among all parameters, is no further from it."""
PAPER_SIZES = {0.1: "855M", 0.3: "665M", 0.5: "475M"}
"""Of 950M; all of its parameters are counted."""
DROPS: dict[str, dict[float, tuple[float, ...]]] = {
    "lambada/acc": {0.1: (0.05,), 0.3: (5.27,), 0.5: (11.72,)},
    "lambada/perplexity": {0.1: (2.0,), 0.3: (14.0,), 0.5: (37.0,)},
    "storycloze/acc": {0.1: (0.29,), 0.3: (5.82,), 0.5: (15.0,)},
    "hellaswag/acc": {0.1: (0.44,), 0.3: (8.17,), 0.5: (19.92,)},
    "nq_open/exact_match": {0.1: (1.15,), 0.3: (5.11, 7.15), 0.5: (7.67,)},
    "webqs/exact_match": {0.1: (1.04,), 0.3: (3.17, 7.88), 0.5: (7.84,)},
    "triviaqa/exact_match": {0.1: (0.44,), 0.3: (3.29, 3.77), 0.5: (8.36,)}}
"""What the paper's model loses: points, of the perplexity per cent, from its Tables 3 and 4. At .3 its Table 2 has other values
(20.35, 32.72 and 65.43 instead of 22.39, 37.43 and 65.91), from which the second number is."""


def paper_tables(frame: pd.DataFrame) -> str:
    """One row per rate and metric, as text that ends with a newline. ValueError where nothing of it was scored on the report
    split."""
    baseline, pool = dense(frame), pruned(frame)
    known = [name for name in DROPS if f"report/{name}" in frame and baseline is not None
             and pd.notna(baseline[f"report/{name}"])]
    if baseline is None or not known:
        raise ValueError(f"{setting(frame, 'directory')}: none of the paper's tasks is scored on the report split; it needs "
                         f"{', '.join(DROPS)}")
    scored = frontier(frame, "report") if quality(pool, "report").notna().any() else pool.head(0)
    rows = []
    for rate in RATES:
        near = scored[(scored["model_sparsity"] - rate).abs() <= NEAR]
        near = near[near["status"] != "dense"].assign(distance=lambda rows: (rows["model_sparsity"] - rate).abs())  # noqa: B023
        best = None if near.empty else near.sort_values(["distance", "key"]).iloc[0]
        compared = [] if best is None else compare(frame, "dense", best["key"]).to_dict("records")
        table = {row["metric"]: row for row in compared}
        for name, drops in DROPS.items():
            paper = " or ".join(f"{drop:g}" for drop in drops[rate])
            sizes = [] if best is None else [human_count(best[column]) for column in ("num_nonzero", "num_parameters")]
            ours = ["-", "-"] if best is None else [f"{best['trial']}/{best['round']}", " of ".join(sizes)]
            rows.append([f"{rate:g}", *ours, PAPER_SIZES[rate], name, *_ours(name, table),
                         f"{paper}{' %' if 'perplexity' in name else ''}"])
    header = ["rate", "candidate", "size", "size in the paper", "metric", "dense", "pruned", "drop", "drop in the paper"]
    return aligned(header, rows, left=("candidate", "metric")) + (
        "drop: what is lost against the own dense model, points, of perplexity per cent; ours with the standard error of the "
        "paired difference\nnot comparable: values, since the paper's model, text, shots and prompts are not known, and rates, "
        "since it counts all parameters\n(a candidate stands for a rate by its zeros among all parameters, at most "
        f"{NEAR:g} away); two drops: the paper's tables contradict each other\n")


def _ours(name: str, table: dict[str, Any]) -> tuple[str, str, str]:
    if (row := table.get(name)) is None:
        return "-", "-", "-"
    if "perplexity" in name:
        sign, unit, end = 1, 100 / row["a"], " %"
    else:
        sign, unit, end = -1, 100.0, ""
    error = "" if math.isnan(row["stderr"]) else f" ± {unit * row['stderr']:.2f}"
    return f"{row['a']:.4g}", f"{row['b']:.4g}", f"{sign * unit * row['difference']:.2f}{error}{end}"
