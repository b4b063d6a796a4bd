"""Tune's searcher: hands out jobs, observes what became of them, and writes the end of a trial that could not do it itself."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from optuna.trial import TrialState
from ray.tune.search import Searcher

from raysearch.config import Study
from raysearch.search.control import due_control, give_up_others, last_control
from raysearch.search.journal import open_journal, seal_journal
from raysearch.search.progress import Progress, last_line
from raysearch.search.retention import delete_above, frontier_keys
from raysearch.search.sampler import Sampler
from raysearch.search.space import GivenTrial, Proposals, Space
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import utc_now
from raysearch.study.records import TrialRecord, config_hash, gives_little, gpu_seconds
from raysearch.trial.inputs import Inputs
from raysearch.trial.rank import RECORDED, Job
from raysearch.trial.watchdog import stuck

MAX_FAILED_ASKS = 3
"""Times in a row that the space may fail before no further trial is asked for."""


class StudySearcher(Searcher):
    """Hands out jobs: the dense baseline, interrupted trials, new trials, and at the end the dense control and the report.

    Resuming is no special case: what the journal and the ledger hold is the whole state, and nothing of Tune is restored.
    """

    def __init__(self, ledger: Ledger, study: Study, space: Space, inputs: Inputs, echo: Callable[[str], None],
                 given: Sequence[GivenTrial] | None = None, mends: Sequence[Job] = (), proposals: Proposals | None = None,
                 show: Callable[[int | None], object] = lambda number: None, enqueued: Sequence[GivenTrial] = (),
                 max_disk_bytes: int | None = None) -> None:
        super().__init__()
        self.ledger, self.study, self.inputs, self.show = ledger, study, inputs, show
        self._max_disk_bytes = max_disk_bytes
        records = ledger.trials()
        asked_for = [trial for trial in records if not trial.is_finish]
        self.progress = Progress(ledger, study, inputs.root_key, echo, asked_for)
        self.finished = False
        self.dense_failed = False
        """Twice, and left no record: then no trial can run."""
        self.refusal: OSError | ValueError | None = None
        """Why nothing more is asked: a disk that is full, a space that contradicts itself. What runs may end."""
        self._deadline = time.monotonic() + study.search.time_budget_s if study.search.time_budget_s else None
        self._gpu_s = ({key: gpu_seconds(record, study.cluster.gpus_per_rank) for key, record in ledger.rounds().items()}
                       if study.search.gpu_hours is not None else {})
        """Of each finished round."""
        self._running: dict[str, Job] = {}
        self._needs_dense = (ledger.report_metrics(inputs.root_key) is None
                             or (study.search.predicts_ms and ledger.latency() is None))
        self._mends = list(mends)
        self._reports_due: list[str] | None = None
        """Known once no trial can change the frontier any more."""
        self._control_was_begun = False
        """In this sweep, or left out for lack of time: one that fails is not tried again before the next sweep."""
        self._num_failed_asks = 0
        """In a row."""
        self._is_used_up = False
        """The space has nothing that was not proposed, or nothing that is worth it."""
        self._says_spent = False
        journal = open_journal(ledger, study, echo, records)
        recorded = {trial.number for trial in records}
        finishes = recorded - {trial.number for trial in asked_for}
        self._interrupted: list[int] = []
        num_asked = 0
        for trial in journal.get_trials(deepcopy=False):
            if trial.number in finishes:  # those that were interrupted are for the command that began them
                continue
            began = trial.number in recorded
            if trial.state == TrialState.RUNNING and began:  # a dead driver left it: it runs again
                self._interrupted.append(trial.number)
            elif trial.state == TrialState.RUNNING:  # the driver died between asking and writing its record
                journal.tell(trial.number, state=TrialState.FAIL)
            num_asked += began or trial.state == TrialState.COMPLETE
        self.sampler = Sampler(journal, study, space, given, num_asked, proposals, inputs.num_train_tokens,
                               enqueued=enqueued)
        if (dense := ledger.round(inputs.root_key)) is not None:
            self.sampler.observe(None, dense)
        for record in records:
            self.sampler.recall(record, ledger.round)

    def has_work(self) -> bool:
        """False when the study is finished and nothing needs to run."""
        goes_on = not self._is_spent() and (bool(self._interrupted) or self._wants_trials()
                                            or due_control(self.ledger, self.study) is not None)
        return bool(self._mends) or goes_on or bool(self._to_report())

    def _wants_trials(self) -> bool:
        """Whether there are more to ask for, and worth it; says once that they are not worth it."""
        if self.sampler.num_asked >= self.study.search.num_trials or self._num_failed_asks >= MAX_FAILED_ASKS:
            return False
        if not self._is_used_up and (why := gives_little(self.sampler.gains, self.study.search.min_gain_per_gpu_hour)):
            self._use_up(why)
        return not self._is_used_up

    def _use_up(self, why: str) -> None:
        self._is_used_up = True
        self.progress.echo(f"no further trial is asked for: {why}")

    def _to_report(self) -> list[str]:
        """Candidates that are to be scored on the report split; reads every record, and so only once, when trials are done."""
        if self._reports_due is None:
            control = last_control(self.ledger)
            keys = [self.inputs.root_key, *frontier_keys(self.ledger, self.study), *(control.keys[-1:] if control else ())]
            self._reports_due = [key for key in dict.fromkeys(keys) if self.ledger.report_metrics(key) is None]
        return self._reports_due

    def suggest(self, trial_id: str) -> Job | str | None:
        with self._refusing():
            job = None if self.refusal else self._next_job()
        if self.refusal or job is None:
            if self._running:
                return None
            self.finished = self.refusal is None
            return Searcher.FINISHED
        self._running[trial_id] = job
        self.progress.started(job)
        if job["kind"] in RECORDED:
            self.show(job["number"])
        return job

    def _next_job(self) -> Job | None:
        if self.dense_failed:
            return None
        if self._needs_dense:
            self._needs_dense = False
            return {"kind": "dense"}
        if self.study.search.predicts_ms and any(job["kind"] == "dense" for job in self._running.values()):
            return None  # it times models, and nothing may run beside them
        if self._mends:
            return self._mends.pop(0)
        out_of_time = self._is_spent()
        if self._interrupted and not out_of_time:
            return self._trial_job(self.ledger.trial(self._interrupted.pop(0)))
        while not out_of_time and self._wants_trials():
            if (job := self._ask()) is not None:
                return job
        if any(job["kind"] != "report" for job in self._running.values()):
            return None
        if not self._control_was_begun:
            self._control_was_begun = True
            if (control := self._control(out_of_time)) is not None:
                return self._trial_job(control)
        due = self._to_report()
        self.progress.reports_left = len(due) + len(self._running)
        return {"kind": "report", "key": due.pop(0)} if due else None

    def _is_spent(self) -> bool:
        """Whether the time, or what rounds may take of GPUs, is up."""
        limit, spent = self.study.search.gpu_hours, sum(self._gpu_s.values()) / 3600
        if limit is not None and spent >= limit:
            if not self._says_spent:
                self.progress.echo(f"no further trial begins: the study's rounds took {spent:.3g} GPU-hours of {limit:g}")
            self._says_spent = True
            return True
        return self._deadline is not None and time.monotonic() > self._deadline

    def _count(self, key: str) -> None:
        if self.study.search.gpu_hours is not None and (record := self.ledger.round(key)) is not None:
            self._gpu_s[key] = gpu_seconds(record, self.study.cluster.gpus_per_rank)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """What Tune would bury under its own traceback ends the search, and is raised when Tune has ended."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.refusal = self.refusal or error

    def _ask(self) -> Job | None:
        """The next trial's job; None where the space makes no trial, which is recorded as one that failed, or no new one."""
        if (asked := self.sampler.ask()) is None:
            self._use_up(f"the space proposes nothing that its {self.sampler.num_asked} trials did not try")
            return None
        record = TrialRecord(number=asked.number, config=asked.config, actions=asked.actions, parameters=asked.parameters,
                             distributions=asked.distributions, forked_at=asked.forked_at,
                             gain_per_gpu_hour=asked.gain_per_gpu_hour, started_at=utc_now())
        if self.ledger.trial_path(record.number).exists():
            raise ValueError(f"{self.ledger.trial_path(record.number)}: is there already, and a trial is never written over by "
                             "another one; move it to another folder if it is not of this study")
        if asked.error is not None:
            self._num_failed_asks += 1
            failed = self._failed(record, str(asked.error), None)
            self.sampler.end(failed)
            self.progress.never_began(failed)
            self.show(failed.number)
            if self._num_failed_asks == MAX_FAILED_ASKS:
                self.progress.echo(f"no further trial is asked for: the space failed {MAX_FAILED_ASKS} times in a row; a "
                                   "mended one is another study, with an --out of its own")
            return None
        self._num_failed_asks = 0
        self.ledger.write_trial(record)
        return self._trial_job(record)

    def _control(self, out_of_time: bool) -> TrialRecord | None:
        """The dense control where one is due: as long as the longest trial, so no report comes before it, and like a trial it
        does not begin after the time budget."""
        control = due_control(self.ledger, self.study)
        if control is not None and out_of_time:
            self.progress.echo("no dense control: the time is up, and it takes as long as the longest trial; the same command "
                               "with more time makes it")
            return None
        if control is not None:
            give_up_others(self.ledger, control)
            self.ledger.write_trial(control)
        return control

    def _trial_job(self, trial: TrialRecord) -> Job:
        return {"kind": "control" if trial.is_control else "trial", "number": trial.number,
                "config_hash": config_hash(self.study, trial.actions)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """After every round but the last, which comes to `on_trial_complete`."""
        job = self._running[trial_id]
        with self._refusing():
            self._count(result["key"])
            if job["kind"] == "trial":  # the search must not hear of a control: no parameter explains it
                self.sampler.observe(job["number"], self.ledger.candidate(result["key"]))
            self.progress.round_done(job)
            self.show(job["number"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job = self._running.pop(trial_id, None)
        if job is None:
            return
        error |= job["kind"] == "dense" and (result or {}).get("status") == "failed"
        with self._refusing():
            if job["kind"] == "dense":
                self._count(self.inputs.root_key)
            if job["kind"] in RECORDED:
                self._end(job["number"], error)
            elif error:
                self.dense_failed |= job["kind"] == "dense" and self.ledger.round(self.inputs.root_key) is None
                self.progress.echo(f"{job['kind']} job failed: {last_line(self.ledger.log_path(-1, 0))}")
            if result is not None or error:
                self.progress.ended(job, error)
            if job["kind"] not in ("report", "mend"):
                self.show(job.get("number"))
            if self._max_disk_bytes is not None:
                delete_above(self.ledger, self.study, self._max_disk_bytes, self.progress.echo)

    def _end(self, number: int, error: bool) -> None:
        """The sampler hears the trial's end. Where its processes died, they could not write it, so it is written here."""
        trial = self.ledger.trial(number)
        stacks = self.ledger.stacks(number) if error else {}
        if trial.status == "running" and not error:
            return  # Tune was interrupted; the next sweep goes on
        if stacks:
            trial = self._failed(trial, stuck(trial, self.study.cluster.round_limit_s, stacks),
                                 "\n".join(f"{rank}: {stack}" for rank, stack in stacks.items()))
        elif trial.status == "running":
            trial = self._failed(trial, "its process died twice, killed or out of memory; the log is in log_path", None)
        for key in trial.keys[-1:]:
            self._count(key)
        if trial.is_control:
            return
        for rank, key in ((None, self.inputs.root_key), *((number, key) for key in trial.keys[-1:])):
            if (candidate := self.ledger.round(key)) is not None:
                self.sampler.observe(rank, candidate)
        if error and trial.status == "failed" and not trial.crashed:  # it wrote its end, and then its gang broke
            trial = trial.model_copy(update={"crashed": True})
            self.ledger.write_trial(trial)
        self.sampler.end(trial)
        seal_journal(self.ledger)

    def _failed(self, trial: TrialRecord, reason: str, traceback: str | None) -> TrialRecord:
        trial = trial.model_copy(update={"status": "failed", "ended_at": utc_now(), "reason": reason, "traceback": traceback,
                                         "crashed": True})
        self.ledger.write_trial(trial)
        return trial

    def waits(self, reason: str) -> None:
        """No gang fits the cluster: trials whose gang is gone have not failed, as their ranks wrote, but wait for another."""
        self.progress.echo(f"waiting for nodes, at most {self.study.cluster.wait_for_nodes_s:g} s: {reason}")
        for job in list(self._running.values()):
            trial = self.ledger.trial(job["number"]) if job["kind"] in RECORDED else None
            if trial is not None and trial.status == "failed":
                self.ledger.write_trial(trial.model_copy(update={"status": "running", "reason": f"waits for nodes: {reason}"}))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal and the ledger are the state."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("run the same sweep again; it attaches to the journal and the ledger")

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """As `save`."""
