"""A short list that stands for a frontier too long to choose from."""

import numpy as np
import pandas as pd

from analysis.candidates import frontier, frontier_split, knee_of, quality, setting
from analysis.tables import aligned, describe_config, metric_pair, with_stderr
from raysearch.units import human_bytes, human_count


def representatives(frame: pd.DataFrame, number: int) -> pd.DataFrame:
    """Rows of the frontier, smallest first, with a `reason` for each: its ends, where it bends, and then one by one the
    candidate that is farthest from the chosen (Gonzalez 1985), in ranks of size and of quality, so that neither's unit counts.

    ValueError for a number below 2."""
    if number < 2:
        raise ValueError(f"--representatives must be 2 or more, got {number}")
    split = frontier_split(frame)
    front = frontier(frame, split)
    front = front[front["status"] != "dense"]
    if front.empty:
        raise ValueError(f"{setting(frame, 'directory')}: no candidate is on the frontier, so there is none to show")
    places = np.column_stack([column.rank().to_numpy(dtype=float) for column in (front[setting(frame, "size")].astype(float),
                                                                                 quality(front, split))])
    reasons = {int(np.argmax(places[:, 1])): "the best", int(np.argmin(places[:, 0])): "the smallest"}
    bend = knee_of(frame, split)
    if bend is not None and bend["key"] in set(front["key"]):
        reasons.setdefault(front["key"].tolist().index(bend["key"]), "where the frontier bends")
    while len(reasons) < min(number, len(front)):
        distance = np.min([np.abs(places - places[i]).max(axis=1) for i in reasons], axis=0)
        reasons[int(np.argmax(distance))] = "far from the others"
    chosen = sorted(list(reasons)[:number])
    return front.iloc[chosen].assign(reason=[reasons[i] for i in chosen])


def describe_representatives(rows: pd.DataFrame) -> str:
    """For a terminal, without a final newline."""
    objective = setting(rows, "objective")
    split = "report" if rows[f"report/{objective}"].notna().all() else "selection"
    cells = [[f"{row['trial']}/{row['round']}", human_count(row["num_nonzero"]), human_bytes(row["stored_bytes"]),
              with_stderr(*metric_pair(row, objective, split)), row["reason"], describe_config(row)]
             for _, row in rows.iterrows()]
    header = ["candidate", "non-zero", "stored", f"{objective}, {split}", "it is", "how"]
    return aligned(header, cells, left=("candidate", "it is", "how")).rstrip("\n")
