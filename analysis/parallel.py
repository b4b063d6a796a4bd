"""The axes of the page's parallel coordinates: where each trial's line crosses each of them, and where the line of each of its
candidates goes on. The page (parallel.js) draws positions and knows no units."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.candidates import frontier, frontier_split, pruned, quality, setting
from analysis.importance import as_used, number_text
from analysis.plots import SIZE_NAMES, limited
from raysearch.config import higher_is_better
from raysearch.pruning.pareto import Floats
from raysearch.units import human_count

END = 1000
"""Positions are 0 to END."""
ABSENT = 90
"""Below it is the place of trials that do not use a hyper-parameter, above the axis, where any trial lacks any."""
MAX_VALUES = 6
"""A number with more has an axis, other ones a place for each."""
LOG_FROM = 30.0
"""Ratio of the ends of an axis in powers of ten."""
OFF_AT_0 = ("l1_lambda", "group_lambda", "layer_drop", "distill_alpha", "distill_hidden", "initial_sparsity", "finetune_epochs")
Axis = dict[str, Any]


def parallel_coordinates(frame: pd.DataFrame) -> dict[str, Any] | None:
    """`axes`: "name", "ticks" ([position, text]) and "at", a position per trial of `trials` (hyper-parameters that vary and
    the status), or, the last two, per candidate of `candidates` ([index of its trial, round]): size, and objective on the
    selection split. `front`: indices of candidates on the frontier of `frontier_split`. None without a candidate.

    A trial whose rounds another one computed first has none of its own, and its line ends before the last two."""
    made = pruned(frame)[lambda rows: quality(rows, "selection").notna()]
    if made.empty:
        return None
    trials = frame[frame["trial"].notna()].drop_duplicates("trial", keep="last")
    used = as_used(trials)
    for name in (name for name in OFF_AT_0 if name in used):
        used[name] = used[name].where(used[name] != 0)
    begin = ABSENT if used.isna().to_numpy().any() else 0
    axes = [_axis(str(name).replace("_", " "), column, begin) for name, column in used.items()]
    if trials["status"].nunique() > 1:
        axes.append(_axis("status", trials["status"], begin))
    number = pd.Series(range(len(trials)), index=trials["trial"])
    split, size, objective = frontier_split(frame), setting(frame, "size"), setting(frame, "objective")
    direction = "higher" if higher_is_better(objective) else "lower"
    ends = [_axis(f"{SIZE_NAMES[size]} (smaller is better)", made[size].astype(float), begin),
            _axis(f"{objective}, selection split ({direction} is better)", made[f"selection/{objective}"], begin,
                  limited(frame, "selection"))]
    front = set(frontier(frame, split)["key"])
    return {"trials": trials["trial"].tolist(), "axes": [*axes, *ends], "begin": begin,
            "candidates": [[int(number[trial]), int(depth)] for trial, depth in made[["trial", "round"]].to_numpy()],
            "front": np.flatnonzero(made["key"].isin(front)).tolist()}


def _axis(name: str, column: pd.Series, begin: int, ends: tuple[float, float] | None = None) -> Axis:
    """Of numbers, from `begin` to END, in powers of ten where they span more than LOG_FROM; values beyond `ends` stand there.
    Of few values or words a place for each, in which the lines stand side by side."""
    used = column.dropna()
    spread = _spread(len(column))
    aside = begin * (0.2 + 0.6 * spread)
    is_number = pd.api.types.is_numeric_dtype(used) and not pd.api.types.is_bool_dtype(used)
    if is_number and used.nunique() > MAX_VALUES:
        low, high = ends or (float(used.min()), float(used.max()))
        is_log = low > 0 and high / low > LOG_FROM
        marks = _powers(low, high) if is_log else _round_numbers(low, high)
        values = np.concatenate([marks, column.astype(float).fillna(low)])
        if is_log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        places = begin + (END - begin) * np.clip((values - low) / (high - low), 0, 1)
        ticks = [[round(place), _text(mark)] for place, mark in zip(places, marks)]
        at = np.where(column.notna(), places[len(marks):], aside)
    else:
        width = (END - begin) / max(1, used.nunique())
        place = {value: begin + width * (index + 0.5) for index, value in enumerate(sorted(used.unique()))}
        ticks = [[round(middle), _text(value) if is_number else str(value)] for value, middle in place.items()]
        at = np.where(column.notna(), column.map(place).astype(float) + (spread - 0.5) * min(0.6 * width, 120), aside)
    if len(used) < len(column):
        ticks.insert(0, [begin // 2, "not used"])
    return {"name": name, "ticks": ticks, "at": np.rint(at).astype(int).tolist()}


def _spread(num: int) -> Floats:
    """[num] in [0, 1), neighbours far apart: multiples of the golden ratio."""
    return np.asarray(np.arange(num) * 0.6180339887498949 % 1, dtype=np.float64)


def _powers(low: float, high: float) -> Sequence[float]:
    """Powers of ten, and three times each where they would be few."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    every = powers if high / low >= 1e4 else sorted([*powers, *(3 * power for power in powers)])
    return [mark for mark in every if low * (1 - 1e-9) <= mark <= high * (1 + 1e-9)]


def _round_numbers(low: float, high: float) -> Sequence[float]:
    """Three to seven, 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= max(factor for factor in (1, 2, 5) if factor * step <= (high - low) / 3)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _text(number: float) -> str:
    return human_count(round(number)) if abs(number) >= 1000 else number_text(number)
