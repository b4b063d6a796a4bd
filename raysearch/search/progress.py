"""The lines that a sweep prints."""

import time
from collections.abc import Callable, Mapping

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

    def __init__(self, ledger: Ledger, study: Study, root_key: str, echo: Callable[[str], None]) -> None:
        self.ledger, self.study, self.root_key, self.echo = ledger, study, root_key, echo
        self.began = time.monotonic()
        self._gangs_ready_s: float | None = None
        self.count = {"running": 0, "done": 0, "stopped": 0, "failed": 0}
        for trial in ledger.trials():
            self.count[trial.status] += trial.status != "running"
        self._before = self.count["done"] + self.count["stopped"] + self.count["failed"]

    def started(self, job: Job) -> None:
        if job["kind"] == "dense":
            self.echo("scoring the dense baseline on both splits")
        self.count["running"] += job["kind"] == "trial"

    def round_done(self, job: Job) -> None:
        trial = self.ledger.trial(job["number"])
        self._selection_line(f"{trial.name} round {len(trial.keys)}/{len(trial.actions)}", trial.keys[-1])

    def ended(self, job: Job, error: bool) -> None:
        if job["kind"] == "trial":
            trial = self.ledger.trial(job["number"])
            self.count["running"] -= 1
            self.count[trial.status] += trial.status != "running"
            self._failed_line(trial)
        elif job["kind"] == "control":
            self._failed_line(self.ledger.trial(job["number"]))
        elif not error and job["kind"] == "dense":  # this job scores both splits
            self._selection_line("selection split, dense baseline", self.root_key)
            self._report_line("report split, dense baseline", self.root_key)
        elif not error:
            control = last_control(self.ledger)
            of_control = control is not None and job["key"] == control.keys[-1]
            self._report_line("report split, dense control" if of_control else "report split", job["key"])

    def never_began(self, trial: TrialRecord) -> None:
        self.count["failed"] += 1
        self._failed_line(trial)

    def _failed_line(self, trial: TrialRecord) -> None:
        if trial.status == "failed":
            self.echo(f"{trial.name} failed: {trial.reason}")

    def _selection_line(self, what: str, key: str) -> None:
        self._line(what, key, self.ledger.candidate(key).metrics)

    def _report_line(self, what: str, key: str) -> None:
        self._line(what, key, self.ledger.report_metrics(key) or {})

    def _line(self, what: str, key: str, metrics: Mapping[str, Metric]) -> None:
        candidate = self.ledger.candidate(key)
        metric = metrics.get(self.study.search.objective)
        quality = f"{self.study.search.objective} {metric.value:.4f}" if metric else ""
        ended = self.count["done"] + self.count["stopped"] + self.count["failed"]
        elapsed = time.monotonic() - self.began
        left = ""
        if self._gangs_ready_s is None:
            self._gangs_ready_s = elapsed
        elif self._before < ended < self.study.search.num_trials:  # of the trials: no guess at the dense control and the report
            to_do = self.study.search.num_trials - ended - self.count["running"] / 2  # what runs is half done
            left = f", about {(elapsed - self._gangs_ready_s) / (ended - self._before) * to_do:.0f} s left"
        counts = ", ".join(f"{n} {status}" for status, n in self.count.items())
        self.echo(f"[{elapsed:4.0f} s] {what}: sparsity {candidate.sparsity:.3f} {quality} | trials: {counts} of "
                  f"{self.study.search.num_trials}{left}")


def last_line(log: AnyPath) -> str:
    """What a failed job said last, and where it said it; of one that was killed, anything."""
    text = log.read_text().strip() if log.is_file() else ""
    return f"{text.splitlines()[-1] if text else 'its process died'} (log in {log})"
