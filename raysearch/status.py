"""How a study is doing, from its directory alone: no ray, no torch, no optuna, from any machine that sees the files."""

import shlex
import time
from datetime import datetime
from math import isnan

from analysis.candidates import dense, frontier, pruned
from analysis.load import load
from analysis.tables import with_stderr
from raysearch.frozen import Frozen
from raysearch.study.ledger import Ledger
from raysearch.study.records import TrialRecord, gives_little
from raysearch.study.storage import AnyPath
from raysearch.units import human_bytes, human_count

MAX_FRONTIER_LINES = 10


class RunningTrial(Frozen):
    number: int
    num_rounds_done: int
    num_rounds: int
    age_s: float
    """Since it started."""
    silent_s: float
    """Since it last finished a round, or started."""


class FailedTrial(Frozen):
    number: int
    reason: str
    log_path: str | None


class ControlStatus(Frozen):
    """The newest dense control: the longest trial's fine-tuning without pruning."""

    status: str
    num_rounds_done: int
    num_rounds: int
    reason: str | None
    value: float | None
    """The objective on the selection split, after its last finished round."""
    stderr: float | None


class FrontierCandidate(Frozen):
    """A candidate that no other one beats in both size and objective, on the selection split."""

    trial: int | None
    """None for the dense baseline."""
    round: int
    key: str
    sparsity: float
    num_nonzero: int
    stored_bytes: int
    value: float
    stderr: float | None


class StudyStatus(Frozen):
    directory: str
    space: str
    model: str
    objective: str
    driver_running: bool
    driver: str
    """Process and host of the driver that runs, or that was killed; "" where the last one ended by itself."""
    num_trials: int
    """Asked for."""
    trials: dict[str, int]
    """Status -> number of trials begun."""
    running: tuple[RunningTrial, ...]
    """Recorded as running; interrupted where no driver runs."""
    failed: tuple[FailedTrial, ...]
    num_candidates: int
    """Finished rounds, without the dense baseline."""
    dense_value: float | None
    control: ControlStatus | None
    """None while none has begun."""
    frontier: tuple[FrontierCandidate, ...]
    """Smallest first."""
    gives_little: str
    """Why the search ended before its trials were spent; "" where it did not."""
    silent_s: float
    """Since anything was written."""
    damage: tuple[str, ...] = ()
    """A sentence on each file that is damaged, missing or none of the study's."""


def study_status(directory: str | AnyPath) -> StudyStatus:
    """Reads the study in `directory`; ValueError of one sentence where there is none."""
    ledger = Ledger.open(directory)
    record = ledger.study()
    frame, objective = load(directory), record.study.search.objective
    baseline, front = dense(frame), frontier(frame, "selection")
    plain = front.astype(object).where(front.notna(), None).to_dict("records")
    running_now, driver = ledger.driver()
    now = time.time()
    trials = ledger.trials()
    written = {trial.number: path.stat().st_mtime for trial in trials if (path := ledger.trial_path(trial.number)).is_file()}
    controls = ledger.controls()
    others = [*(ledger.directory / "trials").glob("-[0-9]*.json"), *ledger.directory.glob("study.json"),
              *ledger.directory.glob("journal.log"), *(ledger.directory / "rounds").glob("[!.]*/*.json")]
    written_s = [*written.values(), *(path.stat().st_mtime for path in others if path.is_file())]
    return StudyStatus(
        directory=str(ledger.directory), space=record.space, model=record.study.model.path, objective=objective,
        driver_running=running_now, driver=driver, num_trials=record.study.search.num_trials,
        trials={status: sum(trial.status == status and not trial.is_finish for trial in trials)
                for status in ("running", "done", "stopped", "failed")},
        running=tuple(
            RunningTrial(number=trial.number, num_rounds_done=len(trial.keys), num_rounds=len(trial.actions),
                         age_s=max(0.0, now - datetime.fromisoformat(trial.started_at).timestamp()),
                         silent_s=max(0.0, now - written.get(trial.number, now)))
            for trial in trials if trial.status == "running"),
        failed=tuple(
            FailedTrial(number=trial.number, reason=trial.reason or "no reason recorded", log_path=trial.log_path)
            for trial in trials if trial.status == "failed"),
        num_candidates=len(pruned(frame)),
        dense_value=None if baseline is None or isnan(value := baseline[f"selection/{objective}"]) else float(value),
        control=_control(ledger, controls[-1], objective) if controls else None,
        frontier=tuple(FrontierCandidate(
            **{name: row[name] for name in ("trial", "round", "key", "sparsity", "num_nonzero", "stored_bytes")},
            value=row[f"selection/{objective}"], stderr=row[f"selection/{objective}_stderr"]) for row in plain),
        gives_little=gives_little([trial.gain_per_gpu_hour for trial in trials if not trial.is_finish],
                                  record.study.search.min_gain_per_gpu_hour),
        silent_s=max(0.0, now - max(written_s, default=now)),
        damage=frame.attrs["damage"])


def describe_status(status: StudyStatus) -> str:
    """A few plain lines, without a final newline."""
    counts = ", ".join(f"{count} {name}" for name, count in status.trials.items() if count) or "none begun"
    if status.driver_running:
        driver = f"running, {status.driver}"
    elif status.driver:
        driver = f"not running: {status.driver} was killed; the same sweep again goes on"
    else:
        driver = "not running"
    what = "running" if status.driver_running else "interrupted"
    lines = [f"study       {status.space} in {status.directory}", f"model       {status.model}",
             f"driver      {driver}", f"trials      {counts}, of {status.num_trials}"]
    lines += [f"{what:<12}trial {trial.number}: round {trial.num_rounds_done}/{trial.num_rounds} finished, started "
              f"{_ago(trial.age_s)}, last written {_ago(trial.silent_s)}" for trial in status.running]
    for trial in status.failed:
        log = f"; log in {trial.log_path}" if trial.log_path else ""
        lines.append(f"failed      trial {trial.number}: {trial.reason}{log}")
    lines += [f"ended       {status.gives_little}"] if status.gives_little else []
    if status.control is not None:
        lines.append(f"control     {_describe_control(status.control, status.objective)}")
    baseline = "not scored yet" if status.dense_value is None else f"{status.dense_value:.4f}"
    lines += [f"candidates  {status.num_candidates}",
              f"frontier    {status.objective} on the selection split, dense {baseline}"]
    for row in status.frontier[:MAX_FRONTIER_LINES]:
        what = "dense" if row.trial is None else f"trial {row.trial} round {row.round}"
        value = with_stderr(row.value, float("nan") if row.stderr is None else row.stderr)
        lines.append(f"            {what}: sparsity {row.sparsity:.3f}, {human_count(row.num_nonzero)} non-zero, "
                     f"{human_bytes(row.stored_bytes)} stored, {value}")
    if len(status.frontier) > MAX_FRONTIER_LINES:
        lines.append(f"            and {len(status.frontier) - MAX_FRONTIER_LINES} more: "
                     f"raysearch results {shlex.quote(status.directory)} --frontier")
    return "\n".join([*lines, f"activity    {_ago(status.silent_s)}"])


def _control(ledger: Ledger, control: TrialRecord, objective: str) -> ControlStatus:
    last = ledger.round(control.keys[-1]) if control.keys else None
    metric = last.metrics.get(objective) if last else None
    return ControlStatus(status=control.status, num_rounds_done=len(control.keys), num_rounds=len(control.actions),
                         reason=control.reason, value=metric.value if metric else None,
                         stderr=metric.stderr if metric else None)


def _describe_control(control: ControlStatus, objective: str) -> str:
    rounds = f"round {control.num_rounds_done}/{control.num_rounds} finished"
    if control.status in ("failed", "stopped"):
        return f"{control.status} after {rounds}: {control.reason or 'no reason recorded'}"
    if control.value is None:
        return rounds
    value = with_stderr(control.value, float("nan") if control.stderr is None else control.stderr)
    return f"{rounds}, {objective} {value} on the selection split, without pruning"


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
