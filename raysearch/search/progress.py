"""The lines that a sweep prints."""

import time
from collections.abc import Callable, Mapping, Sequence

from raysearch.config import Metric, Study
from raysearch.search.control import last_control
from raysearch.study.ledger import Ledger
from raysearch.study.records import TrialRecord
from raysearch.study.storage import AnyPath
from raysearch.trial.rank import Job


class Progress:
    """Plain lines for a terminal and a job log alike: what ran, its objective, what is left.

    A line about a round holds the selection split's value, which the search sees. A line that begins with "report split"
    holds that split's value. The two are of different items, so the dense baseline has a line for each: a value is to be
    read against the baseline of its own split.
    """

    def __init__(self, ledger: Ledger, study: Study, root_key: str, echo: Callable[[str], None],
                 trials: Sequence[TrialRecord] | None = None) -> None:
        self.ledger, self.study, self.root_key, self.echo = ledger, study, root_key, echo
        self.began = time.monotonic()
        self.reports_left: int | None = None
        """Candidates still to be scored on the report split; None while trials or the control run."""
        self._gangs_ready_s: float | None = None
        self._reports_began_s = 0.0
        self._num_reports = 0
        self._longest_s = 0.0
        """Of the trials that trained, to which the dense control is equal."""
        self._status = {trial.number: trial.status for trial in trials or ledger.trials() if trial.status != "running"}
        self._num_before = len(self._status)

    @property
    def count(self) -> dict[str, int]:
        """Trials by their status: each counts once, however often it is heard of."""
        statuses = list(self._status.values())
        return {status: statuses.count(status) for status in ("running", "done", "stopped", "failed")}

    def started(self, job: Job) -> None:
        if job["kind"] == "dense":
            self.echo("scoring the dense baseline on both splits")
        elif job["kind"] == "trial":
            self._status[job["number"]] = "running"
        elif job["kind"] == "report":
            self._reports_began_s = self._reports_began_s or time.monotonic() - self.began

    def round_done(self, job: Job) -> None:
        trial = self.ledger.trial(job["number"])
        self._line(f"{trial.name} round {len(trial.keys)}/{len(trial.actions)}", trial.keys[-1])

    def ended(self, job: Job, error: bool) -> None:
        if job["kind"] == "trial":
            trial = self.ledger.trial(job["number"])
            self._status[trial.number] = trial.status
            if trial.status == "running":  # Tune was interrupted
                del self._status[trial.number]
            if any(action.finetune_tokens for action in trial.actions):
                self._longest_s = max(self._longest_s, trial.seconds)
            self._failed_line(trial)
        elif job["kind"] == "control":
            self._failed_line(self.ledger.trial(job["number"]))
        elif not error and job["kind"] == "dense":  # this job scores both splits
            self._line("selection split, dense baseline", self.root_key)
            self._line("report split, dense baseline", self.root_key, self.ledger.report_metrics(self.root_key) or {})
        elif not error and job["kind"] == "mend":
            self._line("mended", job["key"])
        elif not error:
            self._num_reports += 1
            control = last_control(self.ledger)
            of_control = control is not None and job["key"] == control.keys[-1]
            self._line("report split, dense control" if of_control else "report split", job["key"],
                       self.ledger.report_metrics(job["key"]) or {})

    def never_began(self, trial: TrialRecord) -> None:
        self._status[trial.number] = "failed"
        self._failed_line(trial)

    def _failed_line(self, trial: TrialRecord) -> None:
        if trial.status == "failed":
            self.echo(f"{trial.name} failed: {trial.reason}")

    def _line(self, what: str, key: str, report: Mapping[str, Metric] | None = None) -> None:
        """With the selection split's value, unless that of the report split is given."""
        candidate = self.ledger.candidate(key)
        metric = (candidate.metrics if report is None else report).get(self.study.search.objective)
        quality = f"{self.study.search.objective} {metric.value:.4f}" if metric else ""
        elapsed_s = time.monotonic() - self.began
        counts = ", ".join(f"{n} {status}" for status, n in self.count.items())
        self.echo(f"[{elapsed_s:4.0f} s] {what}: sparsity {candidate.sparsity:.3f} {quality} | trials: {counts} of "
                  f"{self.study.search.num_trials}{self._left(elapsed_s)}")

    def _left(self, elapsed_s: float) -> str:
        """How long the sweep may still take, in words, once there is something to judge by."""
        if self.reports_left is not None:
            left = self.reports_left - 1  # the one that this line tells of was counted
            if not self._num_reports or left < 1:
                return ""
            each_s = (elapsed_s - self._reports_began_s) / self._num_reports
            return f", {left} to report, about {each_s * left:.0f} s left"
        if self._gangs_ready_s is None:  # starting them says nothing about trials
            self._gangs_ready_s = elapsed_s
            return ""
        count = self.count
        num_ended = len(self._status) - count["running"]
        to_do = self.study.search.num_trials - num_ended - count["running"] / 2  # what runs is half done
        if num_ended == self._num_before or to_do <= 0:
            return ""
        trials_s = (elapsed_s - self._gangs_ready_s) / (num_ended - self._num_before) * to_do
        control_s = self._longest_s if self.study.search.dense_control else 0.0
        return f", about {trials_s + control_s:.0f} s left, and the report split"


def last_line(log: AnyPath) -> str:
    """What a failed job said last, and where it said it; of one that was killed, anything."""
    text = log.read_text().strip() if log.is_file() else ""
    return f"{text.splitlines()[-1] if text else 'its process died'} (log in {log})"
