"""What is asked of a candidate, and how one stands to it."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from analysis.tables import metric_pair
from analysis.uncertainty import Draws, paired
from raysearch.config import higher_is_better
from raysearch.frozen import Frozen, parse
from raysearch.units import parse_bytes, parse_count

COLUMN_OF = {"max_bytes": "stored_bytes", "max_nonzero": "num_nonzero", "max_resident": "resident_bytes",
             "max_predicted_ms": "predicted_ms", "max_ms": "decode_ms", "min_tokens_per_s": "scoring_tokens_per_s"}
"""Of constraints without a metric."""
UNITS = {"max_bytes": "bytes too many", "max_nonzero": "parameters too many", "max_resident": "bytes too many",
         "max_predicted_ms": "ms too many", "max_ms": "ms too many", "min_tokens_per_s": "tokens/s too few"}


class Constraint(Frozen):
    """One limit. The value that is compared with it:

    * what COLUMN_OF names, exactly; min, max: the metric in its own unit;
    * max_drop: the loss against the dense baseline, positive when worse: for accuracies in points (1 point = 0.01),
      for metrics where lower is better (perplexity, bits per byte) the rise in the metric's own unit."""

    kind: Literal["max_bytes", "max_nonzero", "max_resident", "max_predicted_ms", "max_ms", "min_tokens_per_s", "max_drop",
                  "min", "max"]
    metric: str | None
    limit: float
    confidence: float | None = Field(None, ge=0.5, le=0.995)
    """That the limit holds on other items; None: on those that were scored."""

    def __str__(self) -> str:
        limit = self.written(self.limit) if self.metric is None else f"{self.metric}={self.limit:g}"
        limit += "" if self.confidence is None else f"@{100 * self.confidence:g}%"
        return f"--{self.kind.replace('_', '-')} {limit}"

    @property
    def is_least(self) -> bool:
        return self.kind in ("min", "min_tokens_per_s")

    def room(self, value: float) -> float:
        """In the limit, for this value: negative where it is missed."""
        return value - self.limit if self.is_least else self.limit - value

    def written(self, number: float) -> str:
        """A value as people read it."""
        return f"{number:.4g}" if self.metric is not None or self.kind.endswith("_ms") else f"{number:,.0f}"


class Check(Frozen):
    """How a candidate stands to a constraint."""

    constraint: Constraint
    value: float
    margin: float
    """Room left in the constraint's unit: negative when it is missed. With a confidence that of `bound`."""
    stderr: float | None = None
    """Standard error of `value`; None when exact or unknown. For max_drop the paired one, without items that of `drop`."""
    within_1_stderr: bool = False
    """The margin is smaller than one standard error: a new set of items could turn the verdict."""
    within_2_stderr: bool = False
    bound: float | None = None
    """With the constraint's confidence `value` is no worse on other items."""
    num_items: int | None = None
    """Behind `bound`."""

    def with_stderr(self, stderr: float | None) -> "Check":
        return self.model_copy(update={"stderr": stderr, "within_1_stderr": stderr is not None and abs(self.margin) < stderr,
                                       "within_2_stderr": stderr is not None and abs(self.margin) < 2 * stderr})


class Measured(Frozen):
    value: float
    stderr: float | None


def parse_constraints(max_bytes: str | None = None, max_nonzero: str | None = None, max_drop: Sequence[str] = (),
                      minimum: Sequence[str] = (), maximum: Sequence[str] = (), max_resident: str | None = None,
                      max_ms: float | None = None, min_tokens_per_s: float | None = None,
                      max_predicted_ms: float | None = None) -> tuple[Constraint, ...]:
    """Constraints from the command line's strings: METRIC=NUMBER for those of metrics."""
    exact = {"max_bytes": max_bytes and parse_bytes(max_bytes), "max_nonzero": max_nonzero and parse_count(max_nonzero),
             "max_resident": max_resident and parse_bytes(max_resident), "max_predicted_ms": max_predicted_ms, "max_ms": max_ms,
             "min_tokens_per_s": min_tokens_per_s}
    constraints = [parse(Constraint, {"kind": kind, "metric": None, "limit": float(limit)}, "constraint")
                   for kind, limit in exact.items() if limit is not None]
    of_metrics = {"max_drop": max_drop, "min": minimum, "max": maximum}
    return (*constraints, *(_parse_metric_constraint(kind, text) for kind, texts in of_metrics.items() for text in texts))


def check_scores(constraint: Constraint, row: pd.Series, baseline: pd.Series) -> Check:
    stderr: float | None = None
    if constraint.metric is None:
        value = float(row[COLUMN_OF[constraint.kind]])
    else:
        measured = measure(row, constraint.metric)
        value, stderr = measured.value, measured.stderr
        if constraint.kind == "max_drop":
            value, stderr = drop(constraint.metric, measured, measure(baseline, constraint.metric))
    value = round(value, 9)  # 100 * (0.61 - 0.6) is 1.0000000000000009, and must satisfy a limit of 1 point
    return Check(constraint=constraint, value=value, margin=round(constraint.room(value), 9)).with_stderr(stderr)


def measure(row: pd.Series, metric: str) -> Measured:
    value, stderr = metric_pair(row, metric, "report")
    return Measured(value=value, stderr=None if math.isnan(stderr) else stderr)


def drop(metric: str, candidate: Measured, reference: Measured) -> tuple[float, float | None]:
    """(what `candidate` loses against `reference`, positive when worse, in the unit of max_drop; its standard error). The error
    adds those of both as if independent; they share their items, so the true one is usually smaller."""
    unit = 100 if higher_is_better(metric) else -1
    stderr = None
    if candidate.stderr is not None and reference.stderr is not None:
        stderr = math.hypot(candidate.stderr, reference.stderr) * abs(unit)
    return unit * (reference.value - candidate.value), stderr


def check_resampled(constraint: Constraint, draws: Draws, root: int, position: int) -> Check:
    """`position`: the candidate's among `draws`, `root`: the dense baseline's."""
    value, drawn = float(draws.value[position]), draws.drawn[:, position]
    if constraint.kind == "max_drop":
        value, drawn = paired(draws, root, position)
        unit = 100 if higher_is_better(draws.metric) else -1
        value, drawn = unit * value, unit * drawn
    bound = value = round(value, 9)
    if (confidence := constraint.confidence) is not None:
        bound = round(float(np.quantile(drawn, 1 - confidence if constraint.is_least else confidence)), 9)
    return Check(constraint=constraint, value=value, margin=round(constraint.room(bound), 9), stderr=float(drawn.std()),
                 bound=bound if constraint.confidence else None, num_items=len(draws.numerator))


def room_in_stderr(check: Check) -> float:
    """Room of the value, in standard errors; without end where it is known exactly."""
    room = check.constraint.room(check.value)
    return room / check.stderr if check.stderr else math.copysign(math.inf, room)


def at_worst(check: Check) -> str:
    if check.bound is None or check.constraint.confidence is None:
        return ""
    side = "least" if check.constraint.is_least else "most"
    return f", at {side} {check.bound:.4g} with {check.constraint.confidence:.3%}".replace("000%", "%").replace(".%", " %")


def miss(check: Check) -> str:
    if check.constraint.metric is None:
        return f"{check.constraint.written(-check.margin)} {UNITS[check.constraint.kind]}"
    points = check.constraint.kind == "max_drop" and higher_is_better(check.constraint.metric)
    noise = "" if check.stderr is None else f", standard error {check.stderr:.2g}"
    return f"by {-check.margin:.4g}{' points' if points else ''}{noise}"


def _parse_metric_constraint(kind: str, text: str) -> Constraint:
    flag = f"--{kind.replace('_', '-')}"
    metric, _, number = text.partition("=")
    number, asked, percent = number.partition("@")
    try:
        limit, confidence = float(number), float(percent.removesuffix("%")) / 100 if asked else None
    except ValueError:
        limit, confidence = math.nan, None
    if not metric or not math.isfinite(limit) or not 0.5 <= (confidence or 0.5) <= 0.995:
        raise ValueError(f"{flag} must be METRIC=NUMBER, such as text/bits_per_byte=0.1, or METRIC=NUMBER@95% for a limit that "
                         f"holds on other items with that confidence, 50 to 99.5 %, got {text!r}")
    if higher_is_better(metric) and kind != "max_drop" and not 0 <= limit <= 1:
        raise ValueError(f"{flag} {metric} must be a fraction between 0 and 1, got {limit:g}")
    return parse(Constraint, {"kind": kind, "metric": metric, "limit": limit, "confidence": confidence}, flag)
