"""Candidates as text: a short table for a terminal, every column for programs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.candidates import control, front_probability, frontier, frontier_split, pruned, setting
from raysearch.config import Action, TrialConfig
from raysearch.units import human_bytes, human_count

Row = pd.Series | Mapping[Any, Any]
"""Of a loaded frame."""
SPEED_COLUMNS = {"predicted_ms": "predicted ms", "scoring_tokens_per_s": "tokens/s", "decode_ms": "decode ms"}
"""Shown where some row has one."""
MAX_WIDTH = 140
"""Characters in a line of the terminal table."""


def results_table(frame: pd.DataFrame, format: str = "table", frontier_only: bool = False) -> str:
    """The rows of a loaded frame, or of its frontier, as text that ends with a newline.

    "json" (a list of objects, null where there is no value) and "csv" (empty there) hold every column of the frame
    and `on_frontier`; "table" holds what fits into MAX_WIDTH characters. Equal studies give equal text."""
    if format not in ("table", "json", "csv"):
        raise ValueError(f"format must be table, json or csv, got {format!r}")
    front = frontier(frame)
    rows = front.assign(front_probability=front_probability(frame, frontier_split(frame))) if frontier_only else frame
    rows = rows.assign(on_frontier=rows["key"].isin(front["key"]) & (rows["status"] != "control"))
    if format == "csv":
        return rows.to_csv(index=False)
    if format == "json":
        plain = rows.astype(object).where(rows.notna(), None)
        return json.dumps(plain.to_dict("records"), indent=1, allow_nan=False, default=lambda number: number.item()) + "\n"
    return _terminal_table(frame, rows)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Plain text columns, two spaces apart; right-aligned but for those named in `left`."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.ljust(width) if name in left else cell.rjust(width) for name, cell, width in zip(header, row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def with_stderr(value: float, stderr: float) -> str:
    """"2.115 ± 0.020"; the value alone where the error is NaN, "" where both are."""
    if np.isnan(value):
        return ""
    decimals = 3 if abs(value) < 100 else 1 if abs(value) < 10_000 else 0
    return f"{value:.{decimals}f}" if np.isnan(stderr) else f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def metric_pair(row: pd.Series, metric: str, split: str) -> tuple[float, float]:
    """A metric of a row and its standard error, for `with_stderr`; NaN where unknown."""
    return float(row[f"{split}/{metric}"]), float(row[f"{split}/{metric}_stderr"])


def describe_config(row: Row) -> str:
    """How the trial was asked to prune, in a few words: "cubic to 0.7 in 3, global, 3 ep, lr 0.0003"; of a fork from which
    round it goes on, and what it did: "from trial 3 round 2 on: to 0.7, layer, wanda, 1.05M tokens, lr 0.0003"."""
    if pd.isna(row["schedule"]):
        return {"dense": "dense baseline", "control": "dense control", "other": f"added: {str(row.get('key'))[6:]}"}.get(
            str(row.get("status")), _given_actions(row))
    if pd.notna(row["threshold"]):
        aim = f"threshold {row['threshold']:.3g}" + (" std" if row["threshold_unit"] == "std" else "")
    elif pd.notna(row["rate"]):
        aim = f"rate {row['rate']:.3g}"
    else:
        aim = f"to {row['target_sparsity']:.3g}" if pd.notna(row["target_sparsity"]) else ""
    if row["initial_sparsity"]:
        aim = f"from {row['initial_sparsity']:.3g} {aim}"
    parts = [f"{row['schedule']} {aim}".strip() + (f" in {row['num_rounds']}" if pd.notna(row["num_rounds"]) else "")]
    return ", ".join([*parts, *_method(row, f"{row['finetune_epochs']:.3g} ep" if row["finetune_epochs"] else "")])


def _method(fields: Row, training: str) -> list[str]:
    """Of a configuration or an action: what differs from the defaults, and how long it trained."""
    parts: list[str] = []
    if pd.isna(fields["threshold"]):
        parts.append(str(fields["scope"]) + (", uniform" if fields["uniform"] else ""))
    parts += [str(fields[name]) for name in ("criterion", "pattern", "budget")
              if fields[name] != TrialConfig.model_fields[name].default]
    if training:
        path = "" if fields["lr_schedule"] == "cosine" else f" {fields['lr_schedule']}"
        parts.append(f"{training}, lr {fields['learning_rate']:.2g}{path}")
    if fields["trainable"] != "all":
        parts.append(f"{fields['trainable']} alone")
    return parts + [f"{word} {fields[name]:.2g}" for name, word in (
        ("distill_alpha", "KL"), ("distill_hidden", "SquareHead"), ("layer_drop", "LayerDrop"), ("l1_lambda", "l1"),
        ("group_lambda", "group lasso")) if fields[name]]


def _given_actions(row: Row) -> str:
    """Of a trial without a configuration: where it began, and what its round did."""
    origin = "by a list of actions" if pd.isna(row.get("forked_from")) else f"from {row['forked_from']} on"
    if pd.isna(row.get("action")):
        return origin
    action = Action.model_validate_json(str(row["action"])).model_dump()
    cut = (f"threshold {action['threshold']:.3g}" if action["sparsity"] is None else
           f"to {action['sparsity']:.3g}" if action["sparsity"] else "masks held")
    cut += " std" if action["threshold_unit"] == "std" else ""
    tokens = f"{human_count(action['finetune_tokens'])} tokens" if action["finetune_tokens"] else ""
    return f"{origin}: {', '.join([cut, *_method(action, tokens)])}"


def _terminal_table(frame: pd.DataFrame, rows: pd.DataFrame) -> str:
    objective = setting(frame, "objective")
    speed = [name for name in SPEED_COLUMNS if rows[name].notna().any()]
    header = ["", "trial", "round", "status", "sparsity", "of model", "non-zero", "stored",
              *(SPEED_COLUMNS[name] for name in speed), "selection", "report", "seconds", "how"]
    cells = [_terminal_row(row, objective, speed) for _, row in rows.iterrows()]
    if speed:  # of these columns the line would be too long for what matters
        kept = [position for position, name in enumerate(header) if name not in ("of model", "seconds")]
        header, cells = [header[i] for i in kept], [[row[i] for i in kept] for row in cells]
    num_models = len(pruned(frame))
    legend = (f"* on the frontier of the {frontier_split(frame)} split; = same model as an earlier row; selection and "
              f"report: {objective} ± stderr\n{num_models} candidates, {len(rows)} rows shown\n")
    lines = (aligned(header, cells, left=("status", "how")) + legend).splitlines()
    if (trained := control(frame)) is not None:
        scores = [f"{split} {with_stderr(*metric_pair(trained, objective, split))}" for split in ("selection", "report")
                  if pd.notna(trained[f"{split}/{objective}"])]
        lines.append(f"dense control (the longest trial's fine-tuning, without pruning): {', '.join(scores)}")
    if rows["dominated_by"].notna().any():
        lines.append("~ dominated: scoring stopped early, its selection is of some items only and not final")
    return "".join(f"{line if len(line) <= MAX_WIDTH else line[:MAX_WIDTH - 1] + '…'}\n" for line in lines)


def _terminal_row(row: pd.Series, objective: str, speeds: Sequence[str]) -> list[str]:
    mark = "*" if row["on_frontier"] else ""
    mark += "=" if row["is_alias"] else ""
    mark += "~" if pd.notna(row["dominated_by"]) else ""
    trial = "-" if pd.isna(row["trial"]) else str(row["trial"])
    how = describe_config(row)
    if pd.isna(row["key"]):
        return [mark, trial, "-", str(row["status"]), *[""] * (7 + len(speeds)), how]
    speed = ["" if pd.isna(row[name]) else human_count(row[name]) if name.endswith("_per_s") else f"{row[name]:.3g}"
             for name in speeds]
    scores = [with_stderr(*metric_pair(row, objective, split)) for split in ("selection", "report")]
    return [mark, trial, str(row["round"]), str(row["status"]), f"{row['sparsity']:.3f}",
            f"{row['model_sparsity']:.3f}", human_count(row["num_nonzero"]), human_bytes(row["stored_bytes"]),
            *speed, *scores,
            "" if pd.isna(row["seconds"]) else f"{row['seconds']:.1f}", how]
