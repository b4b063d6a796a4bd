"""The smallest candidate that satisfies every constraint, and the exact reason when there is none.

The rule, on the report split: keep the candidates that satisfy all constraints; order them by the study's size, then
by the objective (better first), then by key; take the first.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import Field

from analysis.candidates import control, dense, pruned, quality, setting
from analysis.load import HYPERPARAMETERS, metric_names
from analysis.tables import aligned, describe_config, metric_pair, with_stderr
from raysearch.config import Frozen, higher_is_better, parse
from raysearch.study.files import unsealed, write_record
from raysearch.study.ledger import Ledger
from raysearch.study.storage import AnyPath, location
from raysearch.units import human_bytes, human_count, parse_bytes, parse_count

NUM_RUNNERS_UP = 5


class Constraint(Frozen):
    """One limit. The value that is compared with it:

    * max_bytes: `stored_bytes`; max_nonzero: `num_nonzero`; min, max: the metric in its own unit;
    * max_drop: the loss against the dense baseline, positive when worse: for accuracies in points (1 point = 0.01),
      for metrics where lower is better (perplexity, bits per byte) the rise in the metric's own unit."""

    kind: Literal["max_bytes", "max_nonzero", "max_drop", "min", "max"]
    metric: str | None
    limit: float

    def __str__(self) -> str:
        limit = f"{self.limit:,.0f}" if self.metric is None else f"{self.metric}={self.limit:g}"
        return f"--{self.kind.replace('_', '-')} {limit}"


class Check(Frozen):
    """How a candidate stands to a constraint."""

    constraint: Constraint
    value: float
    margin: float
    """Room left in the constraint's unit: negative when it is missed."""
    stderr: float | None
    """Standard error of `value`; None when exact or unknown. For max_drop that of `drop`."""
    within_1_stderr: bool
    """The margin is smaller than one standard error: a new set of items could turn the verdict."""
    within_2_stderr: bool


class Measured(Frozen):
    value: float
    stderr: float | None


class Candidate(Frozen):
    """A candidate with its sizes, its metrics on the report split and its standing to each constraint."""

    key: str
    trial: int
    round: int
    num_nonzero: int
    num_parameters: int
    sparsity: float
    model_sparsity: float
    stored_bytes: int
    resident_bytes: int
    metrics: dict[str, Measured]
    """On the report split."""
    config: dict[str, bool | str | int | float | None]
    """The trial's hyper-parameters."""
    checks: tuple[Check, ...]


class Pick(Candidate):
    """The picked candidate; what pick.json holds."""

    study_directory: str
    """Absolute or a URI; in the file of a local study relative to that file, so that both can be moved together."""
    study_was_at: str | None = None
    """In that file: absolute, for a pick that alone was moved."""
    model: str
    size: str
    """The study's size, by which "smallest" was decided."""
    objective: str
    dense_metrics: dict[str, Measured]
    """Of the dense baseline, on the report split."""
    control_metrics: dict[str, Measured] = Field(default_factory=dict)
    """Of the dense control, on the report split; empty without one."""
    dense_stored_bytes: int
    dense_num_nonzero: int
    num_satisfying: int
    num_scored: int
    """Candidates with the metrics that the constraints name on the report split, among which the choice was made."""
    runners_up: tuple[Candidate, ...]
    """The next larger ones that satisfy everything."""


def parse_constraints(max_bytes: str | None = None, max_nonzero: str | None = None, max_drop: Sequence[str] = (),
                      minimum: Sequence[str] = (), maximum: Sequence[str] = ()) -> tuple[Constraint, ...]:
    """Constraints from the command line's strings: METRIC=NUMBER for the last three."""
    constraints = []
    if max_bytes is not None:
        constraints.append(Constraint(kind="max_bytes", metric=None, limit=float(parse_bytes(max_bytes))))
    if max_nonzero is not None:
        constraints.append(Constraint(kind="max_nonzero", metric=None, limit=float(parse_count(max_nonzero))))
    for text in max_drop:
        constraints.append(_parse_metric_constraint("max_drop", text))
    for text in minimum:
        constraints.append(_parse_metric_constraint("min", text))
    for text in maximum:
        constraints.append(_parse_metric_constraint("max", text))
    return tuple(constraints)


def pick(frame: pd.DataFrame, constraints: Sequence[Constraint]) -> Pick:
    """The smallest candidate of a loaded frame that satisfies all constraints on the report split.

    ValueError: no constraint; an unknown metric; nothing scored on the report split; no candidate satisfies all,
    with the number that satisfies each and the nearest miss."""
    if not constraints:
        raise ValueError("pick needs at least one constraint, got none; without one the smallest candidate is simply "
                         "the worst model (try --max-drop METRIC=1.0)")
    objective = setting(frame, "objective")
    baseline, pool = _scored(frame)
    scored = set(_measured(baseline))
    known = [name for name in metric_names(pool, "report") if name in scored]
    for constraint in constraints:
        if constraint.metric is not None and constraint.metric not in known:
            raise ValueError(f"{constraint}: metric must be one of {', '.join(known)}, got {constraint.metric!r}")
    pool = pool.dropna(subset=[f"report/{constraint.metric}" for constraint in constraints if constraint.metric])
    pool = pool.assign(minus_quality=-quality(pool, "report"))
    pool = pool.sort_values([setting(frame, "size"), "minus_quality", "key"])
    rows = [row for _, row in pool.iterrows()]
    checks = [tuple(_check(constraint, row, baseline) for constraint in constraints) for row in rows]
    passing = [_candidate(row, of_row) for row, of_row in zip(rows, checks) if all(one.margin >= 0 for one in of_row)]
    if not passing:
        raise ValueError(_why_none(rows, constraints, checks, baseline))
    trained = control(frame)
    return Pick(**dict(passing[0]), study_directory=setting(frame, "directory"), model=setting(frame, "model"),
                size=setting(frame, "size"), objective=objective, dense_metrics=_measured(baseline),
                control_metrics={} if trained is None else _measured(trained),
                dense_stored_bytes=int(baseline["stored_bytes"]), dense_num_nonzero=int(baseline["num_nonzero"]),
                num_satisfying=len(passing), num_scored=len(rows), runners_up=tuple(passing[1:1 + NUM_RUNNERS_UP]))


def write_pick(result: Pick, path: str | AnyPath) -> AnyPath:
    """Writes the pick as JSON, aside and moved into place; returns the absolute path."""
    path, study = location(path), location(result.study_directory)
    if isinstance(path, Path) and isinstance(study, Path):
        result = result.model_copy(update={"study_directory": os.path.relpath(study, path.parent), "study_was_at": str(study)})
    elif study == path.parent:
        result = result.model_copy(update={"study_directory": "."})
    write_record(path, result)
    if path == study / "pick.json":
        Ledger(study).write_twice("pick.json", result)
    return path


def read_pick(path: str | AnyPath) -> Pick:
    """The pick in a file of `write_pick`; ValueError when it is missing, damaged or something else."""
    file = location(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); give the pick.json of `raysearch pick`") from error
    try:
        result = Pick.model_validate_json(unsealed(content))
    except ValueError as error:
        raise ValueError(f"{path}: not a pick of this version of raysearch, or damaged; give the pick.json of `raysearch pick`"
                         ) from error
    if "://" in result.study_directory:
        return result
    beside = location(file.parent / result.study_directory)
    found = beside if result.study_was_at is None or Ledger(beside).holds_study() else result.study_was_at
    return result.model_copy(update={"study_directory": str(found), "study_was_at": None})


def describe_pick(result: Pick) -> str:
    """The pick for a terminal, without a final newline: what it is, its metrics beside those of the dense baseline and the
    dense control, every constraint with its margin, what it loses against the control, and the runners-up."""
    text = (f"picked trial {result.trial} round {result.round} ({result.key}): {_sizes(result)}\n"
            f"pruned {describe_config(pd.Series(result.config, dtype=object))}\n")
    others = {"dense": result.dense_metrics} | ({"control": result.control_metrics} if result.control_metrics else {})
    rows = [[name, with_stderr(*_pair(measured)), *(with_stderr(*_pair(of_other.get(name))) for of_other in others.values())]
            for name, measured in result.metrics.items()]
    text += aligned(["report split", "picked", *others], rows, left=("report split",))
    for check in result.checks:
        noise = "" if check.stderr is None else f", standard error {check.stderr:.3g}"
        doubt = "; within 1 standard error: other items could turn it" if check.within_1_stderr else (
            "; within 2 standard errors" if check.within_2_stderr else "")
        number = ",.0f" if check.constraint.metric is None else ".4g"
        text += f"{check.constraint}: {check.value:{number}}, margin {check.margin:{number}}{noise}{doubt}\n"
    limited = [check.constraint.metric for check in result.checks if check.constraint.kind == "max_drop"]
    for metric in dict.fromkeys(limited or [result.objective]):
        text += _drop_against_control(result, metric)
    for other in result.runners_up:
        text += f"runner-up trial {other.trial} round {other.round}: {_sizes(other)}\n"
    return text.rstrip("\n")


def drop(metric: str, candidate: Measured, reference: Measured) -> tuple[float, float | None]:
    """(what `candidate` loses against `reference`, positive when worse, in the unit of max_drop; its standard error). The error
    adds those of both as if independent; they share their items, so the true one is usually smaller."""
    unit = 100 if higher_is_better(metric) else -1
    stderr = None
    if candidate.stderr is not None and reference.stderr is not None:
        stderr = math.hypot(candidate.stderr, reference.stderr) * abs(unit)
    return unit * (reference.value - candidate.value), stderr


def _drop_against_control(result: Pick, metric: str | None) -> str:
    """One line, or nothing where the control or the metric is missing."""
    if metric not in result.control_metrics or metric not in result.metrics:
        return ""
    value, stderr = drop(metric, result.metrics[metric], result.control_metrics[metric])
    noise = "" if stderr is None else f", standard error {stderr:.3g}"
    return (f"drop against the dense control, which was fine-tuned as long without pruning: {metric} {value:.4g}"
            f"{' points' if higher_is_better(metric) else ''}{noise}\n")


def _sizes(candidate: Candidate) -> str:
    return (f"sparsity {candidate.sparsity:.3f}, {human_count(candidate.num_nonzero)} non-zero of "
            f"{human_count(candidate.num_parameters)}, {human_bytes(candidate.stored_bytes)} stored")


def _pair(measured: Measured | None) -> tuple[float, float]:
    if measured is None:
        return math.nan, math.nan
    return measured.value, math.nan if measured.stderr is None else measured.stderr


def _parse_metric_constraint(kind: Literal["max_drop", "min", "max"], text: str) -> Constraint:
    flag = f"--{kind.replace('_', '-')}"
    metric, _, number = text.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not metric or not math.isfinite(limit):
        raise ValueError(f"{flag} must be METRIC=NUMBER, such as text/bits_per_byte=0.1, got {text!r}")
    if higher_is_better(metric) and kind != "max_drop" and not 0 <= limit <= 1:
        raise ValueError(f"{flag} {metric} must be a fraction between 0 and 1, got {limit:g}")
    return parse(Constraint, {"kind": kind, "metric": metric, "limit": limit}, flag)


def _scored(frame: pd.DataFrame) -> tuple[pd.Series, pd.DataFrame]:
    """The dense baseline and the pruned candidates that have report metrics; refuses where one is missing."""
    baseline = dense(frame)
    pool = pruned(frame)
    if pool.empty:
        raise ValueError(f"{setting(frame, 'directory')}: no candidate has finished, so there is nothing to pick from; "
                         "run the sweep to its end")
    column = f"report/{setting(frame, 'objective')}"
    scored = pool[pool[column].notna()]
    if scored.empty or baseline is None or pd.isna(baseline[column]):
        missing = "no candidate" if scored.empty else "the dense baseline is not"
        raise ValueError(f"{setting(frame, 'directory')}: {missing} scored on the report split, which a pick is judged "
                         "by; run the sweep to its end")
    return baseline, scored


def _check(constraint: Constraint, row: pd.Series, baseline: pd.Series) -> Check:
    stderr: float | None = None
    if constraint.metric is None:
        value = float(row["stored_bytes" if constraint.kind == "max_bytes" else "num_nonzero"])
    else:
        measured = _value(row, constraint.metric)
        value, stderr = measured.value, measured.stderr
        if constraint.kind == "max_drop":
            value, stderr = drop(constraint.metric, measured, _value(baseline, constraint.metric))
    value = round(value, 9)  # 100 * (0.61 - 0.6) is 1.0000000000000009, and must satisfy a limit of 1 point
    margin = round(value - constraint.limit if constraint.kind == "min" else constraint.limit - value, 9)
    return Check(constraint=constraint, value=value, margin=margin, stderr=stderr,
                 within_1_stderr=stderr is not None and abs(margin) < stderr,
                 within_2_stderr=stderr is not None and abs(margin) < 2 * stderr)


def _value(row: pd.Series, metric: str) -> Measured:
    value, stderr = metric_pair(row, metric, "report")
    return Measured(value=value, stderr=None if math.isnan(stderr) else stderr)


def _measured(row: pd.Series) -> dict[str, Measured]:
    names = [str(name)[len("report/"):-len("_stderr")] for name in row.index
             if str(name).startswith("report/") and str(name).endswith("_stderr")]
    return {name: _value(row, name) for name in names if pd.notna(row[f"report/{name}"])}


def _candidate(row: pd.Series, checks: tuple[Check, ...]) -> Candidate:
    return Candidate(
        key=str(row["key"]), trial=int(row["trial"]), round=int(row["round"]), num_nonzero=int(row["num_nonzero"]),
        num_parameters=int(row["num_parameters"]), sparsity=float(row["sparsity"]),
        model_sparsity=float(row["model_sparsity"]), stored_bytes=int(row["stored_bytes"]),
        resident_bytes=int(row["resident_bytes"]), metrics=_measured(row),
        config={name: None if pd.isna(row[name]) else row[name] for name in HYPERPARAMETERS},
        checks=checks)


def _why_none(rows: list[pd.Series], constraints: Sequence[Constraint], checks: list[tuple[Check, ...]],
              baseline: pd.Series) -> str:
    parts = []
    for position, constraint in enumerate(constraints):
        of_all = [of_row[position] for of_row in checks]
        misses = [i for i, check in enumerate(of_all) if check.margin < 0]
        part = f"{constraint} is satisfied by {len(rows) - len(misses)} of {len(rows)}"
        if misses:
            nearest = max(misses, key=lambda i: of_all[i].margin)
            part += f" (the nearest that misses is {_name(rows[nearest])}, {_miss(of_all[nearest])})"
        parts.append(part)
    reason = f"no candidate satisfies {'the constraint' if len(constraints) == 1 else 'all constraints'}: "
    reason += "; ".join(parts)
    if len(constraints) > 1 and rows:
        missed = [[check for check in of_row if check.margin < 0] for of_row in checks]
        nearest = min(range(len(rows)), key=lambda i: (len(missed[i]), sum(_relative_miss(one) for one in missed[i])))
        names = " and ".join(f"{check.constraint} ({_miss(check)})" for check in missed[nearest])
        reason += f"; the nearest to all is {_name(rows[nearest])}, which misses only {names}"
    if all(_check(constraint, baseline, baseline).margin >= 0 for constraint in constraints):
        reason += "; only the dense baseline satisfies all"
    return reason


def _relative_miss(check: Check) -> float:
    """Size of the miss as a share of the limit, or as it is where that is 0."""
    return -check.margin / (abs(check.constraint.limit) or 1.0)


def _name(row: pd.Series) -> str:
    return f"trial {row['trial']} round {row['round']}"


def _miss(check: Check) -> str:
    if check.constraint.metric is None:
        return f"{-check.margin:,.0f} {'bytes' if check.constraint.kind == 'max_bytes' else 'parameters'} too many"
    points = check.constraint.kind == "max_drop" and higher_is_better(check.constraint.metric)
    noise = "" if check.stderr is None else f", standard error {check.stderr:.2g}"
    return f"by {-check.margin:.4g}{' points' if points else ''}{noise}"
