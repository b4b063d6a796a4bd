"""The smallest candidate that satisfies every constraint, and the exact reason when there is none.

The rule, on the report split: keep the candidates that satisfy all constraints; order them by the study's size, then
by the objective (better first), then by key; take the first. A constraint with a confidence ("=1@95%") is satisfied where its
value keeps the limit on other items with that confidence; then the selection split orders the candidates, and the report split
tests one after the other until one fails (uncertainty.fixed_sequence), so that the confidence is that of the pick.
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pandas as pd
from pydantic import Field

from analysis.candidates import control, dense, pruned, quality, setting
from analysis.compare import POWER, find
from analysis.constraints import (
    COLUMN_OF,
    Check,
    Constraint,
    Measured,
    at_worst,
    check_resampled,
    check_scores,
    measure,
    miss,
    room_in_stderr,
)
from analysis.load import HYPERPARAMETERS, SPLITS, load, metric_names
from analysis.tables import aligned, describe_config, results_table, with_stderr
from analysis.uncertainty import fixed_sequence, resample, whole_items
from raysearch.config import higher_is_better
from raysearch.frozen import Frozen
from raysearch.study.files import unsealed, write_record
from raysearch.study.ledger import Ledger, Split
from raysearch.study.records import Provenance
from raysearch.study.storage import AnyPath, location
from raysearch.units import human_bytes, human_count

NUM_RUNNERS_UP = 5


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
    scoring_tokens_per_s: float | None = None
    """This and the next: as `raysearch measure` found; None where it did not look."""
    decode_ms: float | None = None
    predicted_ms: float | None = None
    """Of a batch; None where the search did not ask for it."""
    metrics: dict[str, Measured]
    """On the report split."""
    config: dict[str, bool | str | int | float | None]
    """The trial's hyper-parameters; none of a fork."""
    how: str = ""
    """How it was made, in words."""
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
    against_control: tuple[Check, ...] = ()
    """What it loses against the dense control, of the metrics whose drop is limited, or of the objective."""
    runners_up: tuple[Candidate, ...]
    """The next larger ones that satisfy everything."""
    next_uncertain: Candidate | None = None
    """With a confidence: the first that was not certain, smaller than the pick."""
    results_sha256: str
    """Of what the study held when the pick was made: `raysearch results DIR --format csv | sha256sum`."""
    root_key: str
    """Of the dense baseline: a hash of the model, the text and the tasks."""
    data: dict[str, Any]
    """Settings of the text and of the evaluation, with the seed."""
    made: Provenance
    """With what the candidate was made: device, versions, commit."""


def pick(frame: pd.DataFrame, constraints: Sequence[Constraint], candidate: str | None = None) -> Pick:
    """The smallest candidate of a loaded frame that satisfies all constraints on the report split. Or the one that is named, as
    compare.find does, without a constraint: one that was chosen by its numbers keeps a limit with no known confidence.

    ValueError: no constraint; an unknown metric; nothing scored on the report split; no candidate satisfies all,
    with the number that satisfies each and the nearest miss."""
    if candidate is not None and constraints:
        raise ValueError(f"--candidate {candidate} and {constraints[0]} contradict each other: give one, or the other")
    if not constraints and candidate is None:
        raise ValueError("pick needs at least one constraint, got none; without one the smallest candidate is simply "
                         "the worst model (try --max-drop METRIC=1.0)")
    objective = setting(frame, "objective")
    baseline, pool = _scored(frame)
    if candidate is not None:
        named = find(frame, candidate)
        pool = pool[pool["key"] == named["key"]]
        if pool.empty:
            raise ValueError(f"--candidate {candidate} must be a pruned one that was scored on the report split; those of "
                             "`raysearch results DIR --frontier` are")
    scored = set(_measured(baseline))
    known = [name for name in metric_names(pool, "report") if name in scored]
    for constraint in constraints:
        if constraint.metric is not None and constraint.metric not in known:
            raise ValueError(f"{constraint}: metric must be one of {', '.join(known)}, got {constraint.metric!r}")
    pool = pool.dropna(subset=[f"report/{constraint.metric}" for constraint in constraints if constraint.metric])
    for constraint in constraints:
        if (column := COLUMN_OF.get(constraint.kind)) is not None:
            pool = pool[pool[column].notna()]
            if pool.empty:
                directory = setting(frame, "directory")
                if column == "predicted_ms":
                    raise ValueError(f"{constraint}: the study predicted no times, for its search does not ask for them; "
                                     f"raysearch measure {directory}, then pick with --max-ms")
                raise ValueError(f"{constraint}: no candidate's speed was measured; raysearch measure {directory}, then pick")
    pool = pool.assign(minus_quality=-quality(pool, "report"))
    pool = pool.sort_values([setting(frame, "size"), "minus_quality", "key"])
    rows, failed = [row for _, row in pool.iterrows()], None
    if any(constraint.confidence is not None for constraint in constraints):
        passing, failed = _certain(frame, constraints, baseline, rows)
    else:
        checks = _with_paired_errors(frame, constraints, baseline, rows)
        passing = [_candidate(row, of_row) for row, of_row in zip(rows, checks) if all(one.margin >= 0 for one in of_row)]
        if not passing:
            raise ValueError(_why_none(rows, constraints, checks, baseline))
    trained, limited = control(frame), [constraint.metric for constraint in constraints if constraint.kind == "max_drop"]
    against = [Constraint(kind="max_drop", metric=metric, limit=0.0) for metric in dict.fromkeys(limited or [objective])
               if trained is not None and pd.notna(trained[f"report/{metric}"])]
    chosen = [row for row in rows if row["key"] == passing[0].key]
    return Pick(**dict(passing[0]), study_directory=setting(frame, "directory"), model=setting(frame, "model"),
                size=setting(frame, "size"), objective=objective, dense_metrics=_measured(baseline),
                control_metrics={} if trained is None else _measured(trained),
                dense_stored_bytes=int(baseline["stored_bytes"]), dense_num_nonzero=int(baseline["num_nonzero"]),
                num_satisfying=len(passing), num_scored=len(rows), runners_up=tuple(passing[1:1 + NUM_RUNNERS_UP]),
                against_control=() if trained is None else _with_paired_errors(frame, against, trained, chosen)[0],
                next_uncertain=failed, **_origin(frame, passing[0].key))


def _origin(frame: pd.DataFrame, key: str) -> dict[str, Any]:
    """What a pick says of where its numbers come from."""
    ledger = Ledger.open(setting(frame, "directory"))
    record = ledger.study()
    data = record.study.model_dump(mode="json", include={"data", "evaluation"})
    return {"results_sha256": results_sha256(frame), "root_key": record.root_key, "data": data,
            "made": ledger.candidate(key).provenance}


def results_sha256(frame: pd.DataFrame) -> str:
    return hashlib.sha256(results_table(frame.sort_index(), "csv").encode()).hexdigest()


def check_pick(result: Pick, echo: Callable[[str], None]) -> None:
    """ValueError unless the study holds the picked candidate with the numbers that the pick states; `echo` gets a line where it
    holds something else than when the pick was made."""
    frame = load(result.study_directory)
    rows = frame[frame["key"] == result.key]
    found = None if rows.empty else _candidate(rows.iloc[0].fillna({"trial": -1, "round": -1}), result.checks)
    stated = {name: getattr(result, name) for name in ("metrics", "num_nonzero", "stored_bytes", "resident_bytes", "sparsity")}
    for name, value in stated.items():
        if found is None or getattr(found, name) != value:
            raise ValueError(f"the pick of {result.key} is not what the study {result.study_directory} holds: "
                             f"{'no such candidate' if found is None else name + ' differs'}; pick again")
    if results_sha256(frame) != result.results_sha256:
        echo("the study holds more, or something else, than when the pick was made; another pick may be smaller")


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
            f"pruned {result.how}\n")
    others = {"dense": result.dense_metrics} | ({"control": result.control_metrics} if result.control_metrics else {})
    rows = [[name, _written(measured), *(_written(of_other.get(name)) for of_other in others.values())]
            for name, measured in result.metrics.items()]
    text += aligned(["report split", "picked", *others], rows, left=("report split",))
    for check in result.checks:
        noise = at_worst(check) + ("" if check.stderr is None else f", standard error {check.stderr:.3g}")
        doubt = "; within 1 standard error: other items could turn it" if check.within_1_stderr else (
            "; within 2 standard errors" if check.within_2_stderr else "")
        written = check.constraint.written
        text += f"{check.constraint}: {written(check.value)}, margin {written(check.margin)}{noise}{doubt}\n"
    for check in result.against_control:
        noise = "" if check.stderr is None else f", standard error {check.stderr:.3g}"
        text += ("drop against the dense control, which was fine-tuned as long without pruning: "
                 f"{check.constraint.metric} {check.value:.4g}"
                 f"{' points' if higher_is_better(str(check.constraint.metric)) else ''}{noise}\n")
    for other in result.runners_up:
        text += f"runner-up trial {other.trial} round {other.round}: {_sizes(other)}\n"
    if result.next_uncertain is not None:
        text += f"the next smaller is not certain: {_uncertain(result.next_uncertain)}\n"
    return text.rstrip("\n")


def _sizes(candidate: Candidate) -> str:
    speed = "" if candidate.decode_ms is None or candidate.scoring_tokens_per_s is None else (
        f", scoring {human_count(candidate.scoring_tokens_per_s)} tokens/s, decoding {candidate.decode_ms:.3g} ms a step")
    speed += "" if candidate.predicted_ms is None else f", {candidate.predicted_ms:.4g} ms predicted"
    return (f"sparsity {candidate.sparsity:.3f}, {human_count(candidate.num_nonzero)} non-zero of "
            f"{human_count(candidate.num_parameters)}, {human_bytes(candidate.stored_bytes)} stored{speed}")


def _written(measured: Measured | None) -> str:
    return "" if measured is None else with_stderr(measured.value, math.nan if measured.stderr is None else measured.stderr)


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


def _with_paired_errors(frame: pd.DataFrame, constraints: Sequence[Constraint], baseline: pd.Series, rows: list[pd.Series]
                        ) -> list[tuple[Check, ...]]:
    """The checks of each row; their errors are those of paired differences where the items are known."""
    checks = [tuple(check_scores(constraint, row, baseline) for constraint in constraints) for row in rows]
    try:
        resampled = _resampled(frame, constraints, baseline, rows, "report")
    except ValueError:  # items of few documents
        return checks
    return [tuple(one.with_stderr(other.stderr) for one, other in zip(of_row, resampled.get(row["key"], of_row)))
            for row, of_row in zip(rows, checks)]


def _certain(frame: pd.DataFrame, constraints: Sequence[Constraint], baseline: pd.Series, rows: list[pd.Series]
             ) -> tuple[list[Candidate], Candidate | None]:
    """(those that keep every constraint with its confidence, smallest first; the first that does not); ValueError for none."""
    exact = [constraint for constraint in constraints if constraint.metric is None]
    small = [row for row in rows if all(check_scores(constraint, row, baseline).margin >= 0 for constraint in exact)]
    if not small:
        checks = [tuple(check_scores(constraint, row, baseline) for constraint in exact) for row in rows]
        raise ValueError(_why_none(rows, exact, checks, baseline))
    splits = [_resampled(frame, constraints, baseline, small, split) for split in SPLITS]
    whole = [row for row in small if all(row["key"] in checks for checks in splits)]
    if not whole:
        raise ValueError(f"{setting(frame, 'directory')}: a confidence needs the items of dense and of a candidate "
                         "on the selection split and on the report split, got none; leave out the @")
    selected, reported = [[checks[row["key"]] for row in whole] for checks in splits]
    rooms = [min(map(room_in_stderr, of_row)) for of_row in selected]
    passed, failed = fixed_sequence([float(row[setting(frame, "size")]) for row in whole], rooms,
                                    [all(check.margin >= 0 for check in of_row) for of_row in reported])
    made = [_candidate(row, of_row) for row, of_row in zip(whole, reported)]
    if not passed:
        uncertain = [one for one in made if any(check.margin < 0 for check in one.checks)]
        nearest = max(uncertain, key=lambda one: min(check.margin / (check.stderr or 1.0) for check in one.checks))
        raise ValueError(f"no candidate is certain: of {len(made)} the nearest is {_uncertain(nearest)}")
    return [made[i] for i in reversed(passed)], None if failed is None else made[failed]


def _resampled(frame: pd.DataFrame, constraints: Sequence[Constraint], baseline: pd.Series, rows: list[pd.Series], split: Split
               ) -> dict[str, tuple[Check, ...]]:
    """By key, of the candidates with whole items on `split`: all checks, those of metrics from one resampling."""
    metrics = list(dict.fromkeys(constraint.metric for constraint in constraints if constraint.metric is not None))
    both = pd.DataFrame([baseline, *rows]).drop_duplicates("key").set_index("key")
    recorded = both[[f"{split}/{metric}" for metric in metrics]].set_axis(metrics, axis=1)
    items = whole_items(setting(frame, "directory"), recorded, split)
    root, made = baseline["key"], {}
    draws = {metric: resample(metric, list(items[metric].values())) for metric in metrics if root in items[metric]}
    for row in rows:
        if all(metric in draws and row["key"] in items[metric] for metric in metrics):
            made[row["key"]] = tuple(
                check_scores(constraint, row, baseline) if constraint.metric is None else
                check_resampled(constraint, draws[constraint.metric],
                                *map(list(items[constraint.metric]).index, (root, row["key"])))
                for constraint in constraints)
    return made


def _uncertain(candidate: Candidate) -> str:
    """The constraints that a candidate may break, and how many items more would tell."""
    texts = []
    for check in candidate.checks:
        if check.margin < 0 and check.bound is not None:
            confidence, num_items = check.constraint.confidence or 0.5, check.num_items or 0
            reach = NormalDist().inv_cdf(confidence) + NormalDist().inv_cdf(POWER)
            room = room_in_stderr(check)
            more = math.ceil(num_items * ((reach / room) ** 2 - 1)) if room > 0 else 0
            tell = f"about {more:,} items more would tell" if more > 0 else "no number of items would make that certain"
            texts.append(f"{check.constraint} is {check.value:.4g}{at_worst(check)}; {tell}")
        elif check.margin < 0:
            texts.append(f"{check.constraint} is missed ({miss(check)})")
    return f"trial {candidate.trial} round {candidate.round}, {_sizes(candidate)}: {' and '.join(texts)}"


def _measured(row: pd.Series) -> dict[str, Measured]:
    names = [str(name)[len("report/"):-len("_stderr")] for name in row.index
             if str(name).startswith("report/") and str(name).endswith("_stderr")]
    return {name: measure(row, name) for name in names if pd.notna(row[f"report/{name}"])}


def _candidate(row: pd.Series, checks: tuple[Check, ...]) -> Candidate:
    return Candidate(
        key=str(row["key"]), trial=int(row["trial"]), round=int(row["round"]), num_nonzero=int(row["num_nonzero"]),
        num_parameters=int(row["num_parameters"]), sparsity=float(row["sparsity"]),
        model_sparsity=float(row["model_sparsity"]), stored_bytes=int(row["stored_bytes"]),
        resident_bytes=int(row["resident_bytes"]),
        **{name: None if pd.isna(row[name]) else float(row[name])
           for name in ("scoring_tokens_per_s", "decode_ms", "predicted_ms")},
        metrics=_measured(row),
        config={name: None if pd.isna(row[name]) else row[name] for name in HYPERPARAMETERS}, how=describe_config(row),
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
            part += f" (the nearest that misses is {_name(rows[nearest])}, {miss(of_all[nearest])})"
        parts.append(part)
    reason = f"no candidate satisfies {'the constraint' if len(constraints) == 1 else 'all constraints'}: {'; '.join(parts)}"
    if len(constraints) > 1 and rows:
        missed = [[check for check in of_row if check.margin < 0] for of_row in checks]
        relative = [sum(-one.margin / (abs(one.constraint.limit) or 1.0) for one in of_row) for of_row in missed]
        nearest = min(range(len(rows)), key=lambda i: (len(missed[i]), relative[i]))
        names = " and ".join(f"{check.constraint} ({miss(check)})" for check in missed[nearest])
        reason += f"; the nearest to all is {_name(rows[nearest])}, which misses only {names}"
    if all(check_scores(constraint, baseline, baseline).margin >= 0 for constraint in constraints):
        reason += "; only the dense baseline satisfies all"
    return reason


def _name(row: pd.Series) -> str:
    return f"trial {row['trial']} round {row['round']}"


