"""The search: Optuna proposes, Ray Tune runs, the ledger remembers. The one door to optuna.

Optuna's journal and the round store are the whole state of a study. The same `sweep` again attaches to them: finished
rounds are found, trials that were running start again from their last finished round, a larger number of trials extends.
Nothing of Ray is restored.

Ray's own OptunaSearch cannot do this job (several objectives, failures, resume: docs/log.md), so
`StudySearcher` is a small one on `study.ask` and `study.tell`.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune.search import Searcher

from analysis.frontier import pareto_front
from analysis.tables import human_bytes
from raysearch.bench import Inputs, check_objective, read_inputs, resolve
from raysearch.cluster import out_of_memory_as_death, placed, start_ray, stopping_on_signals
from raysearch.config import Action, Study, TrialConfig, higher_is_better, parse
from raysearch.ledger import Ledger, StudyRecord, TrialRecord, config_hash, hash_json, persist, round_key
from raysearch.provenance import provenance, utc_now
from raysearch.round import resolve_actions
from raysearch.storage import AnyPath, StorePath, pull, push
from raysearch.trial import Job, PruneTrial, gang_resources, put_base

Space = Callable[[optuna.Trial], dict[str, Any]]
Keep = Literal["frontier", "all", "none"]
"""Whose weights stay when a study has ended: the frontier's on the selection split, everybody's, nobody's."""


@dataclass(frozen=True)
class SweepResult:
    directory: AnyPath
    interrupted: bool
    num_trials: int
    num_candidates: int
    num_failed: int
    seconds: float


def load_space(name: str) -> tuple[Study, Space]:
    """`STUDY` and `space` of a search space module, importable by name from here; ValueError of one sentence."""
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"search space {name}: cannot be imported ({error}); give a module such as "
                         "search_spaces.demo, importable from the current folder") from error
    finally:
        sys.path.remove(os.getcwd())
    study, space = getattr(module, "STUDY", None), getattr(module, "space", None)
    if not isinstance(study, dict) or not callable(space):
        raise ValueError(f"search space {name}: must define STUDY (a dict of settings) and space(trial); got "
                         f"{type(study).__name__} and {type(space).__name__}")
    return parse(Study, study, f"{name}.STUDY"), space


def space_hash(space: Space) -> str:
    """Hash of the code of `space`, comments and layout left out."""
    tree = ast.parse(inspect.getsource(space).strip())
    return hash_json(ast.dump(tree))


GIVEN = "given"
"""What stands for the space's hash in a study whose trials are given."""


def read_trials(file: Path) -> list[TrialConfig]:
    """The configurations of a file of JSON lines, blank ones left out; ValueError names the line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--trials-from {file}: cannot be read ({error}); give a file of JSON lines, each the settings of one "
                         "trial") from error
    configs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"--trials-from {file}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: is not JSON ({error}); give one object of trial settings in each line") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: must be an object of trial settings, got {line.strip()[:40]}")
        configs.append(parse(TrialConfig, fields, where))
    if not configs:
        raise ValueError(f"--trials-from {file}: holds no trial; give one object of trial settings in each line")
    return configs


def check_given(given: Sequence[TrialConfig], trials: Sequence[TrialRecord]) -> None:
    """ValueError unless the study's trials are the first of the given ones."""
    for position, (config, trial) in enumerate(zip(given, trials), start=1):
        if config != trial.config:
            raise ValueError(f"trial {trial.number} of the study is not number {position} of the given trials; give the same "
                             "list, longer or not, or a new directory with --out")


def sweep(space_name: str, directory: str | AnyPath, study: Study, space: Space, echo: Callable[[str], None], *,
          given: Sequence[TrialConfig] | None = None, keep: Keep = "all", autoscaling: bool = False,
          mlflow_uri: str | None = None, wandb_project: str | None = None) -> SweepResult:
    """Runs, resumes or extends the study in `directory` until its trials, or its time, are spent; then deletes the
    weights that `keep` does not name. With `autoscaling` trials wait for nodes that the cluster adds. `given` trials run, in
    their order, instead of what the sampler makes of `space`; a longer list extends the study.

    Raises ValueError of one sentence for bad input, before anything is written.
    """
    ledger = Ledger(directory)
    loggers = logger_callbacks(ledger.directory.name, mlflow_uri, wandb_project)
    study = resolve(study if given is None else study.model_copy(update={"num_trials": len(given)}))
    inputs = read_inputs(study)
    check_objective(study, inputs)
    if given is None:
        sample_trials(study, space, inputs, 20)  # a mistake in the space is told before anything is written
    else:
        for config in given:
            resolve_actions(config, study, inputs.num_train_tokens)
    started = time.monotonic()
    recorded = ledger.study().study if (ledger.directory / "study.json").is_file() else None
    study = placed(study, recorded, echo)
    with ledger.lock():
        attached = ledger.attach(StudyRecord(study=study, space=space_name,
                                             space_hash=GIVEN if given is not None else space_hash(space),
                                             root_key=inputs.root_key, provenance=provenance("cpu")))
        check_given(given or (), ledger.trials())
        if attached:
            ledger.delete_leftovers()
            echo(f"resuming {ledger.directory}: {len(ledger.trials())} trials, {len(ledger.rounds())} candidates so far")
        interrupted = False
        searcher = StudySearcher(ledger, study, space, inputs, echo, given)
        if searcher.has_work():
            start_ray(study, autoscaling)
            interrupted = run_tune(ledger, study, searcher, loggers)
            ledger.delete_leftovers()
            if searcher.dense_failed:
                raise ValueError("the dense baseline could not be scored, so no trial can run: "
                                 + last_line(ledger.log_path(-1, 0)))
        if keep != "all" and not interrupted:
            delete_unneeded(ledger, study, keep, echo)
    trials = ledger.trials()
    keys = {key for trial in trials for key in trial.keys}
    return SweepResult(ledger.directory, interrupted, len(trials), len(keys),
                       sum(trial.status == "failed" for trial in trials), time.monotonic() - started)


def last_line(log: AnyPath) -> str:
    """What a failed job said last, and where it said it; of one that was killed, anything."""
    text = log.read_text().strip() if log.is_file() else ""
    return f"{text.splitlines()[-1] if text else 'its process died'} (log in {log})"


def logger_callbacks(name: str, mlflow_uri: str | None, wandb_project: str | None) -> list[tune.Callback]:
    """Ray's own loggers beside TensorBoard's, which Tune always writes; ValueError where a package is missing."""
    asked = {"mlflow": mlflow_uri, "wandb": wandb_project}
    for package, value in asked.items():
        if value is not None and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{package} needs the package {package}, which is not installed here: pip install {package}")
    loggers: list[tune.Callback] = []
    if mlflow_uri is not None:
        loggers.append(MLflowLoggerCallback(tracking_uri=mlflow_uri, experiment_name=name))
    if wandb_project is not None:
        loggers.append(WandbLoggerCallback(project=wandb_project, group=name))
    return loggers


def run_tune(ledger: Ledger, study: Study, searcher: "StudySearcher", loggers: list[tune.Callback]) -> bool:
    """Runs Tune until the searcher has finished; True when it was interrupted before."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("TUNE_WARN_THRESHOLD_S", "60")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would save a state that nothing reads
    base = put_base(study)
    trainable = tune.with_resources(
        tune.with_parameters(PruneTrial, study=study, directory=str(ledger.directory), root_key=searcher.inputs.root_key,
                             base=[base]),
        gang_resources(study))
    tune_folder = ledger.directory / "tune"
    filesystem, storage_path = ((tune_folder.filesystem, tune_folder.path) if isinstance(tune_folder, StorePath)
                                else (None, str(tune_folder)))
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1, max_concurrent_trials=study.max_concurrent,
                                    reuse_actors=True),
        run_config=tune.RunConfig(storage_path=storage_path, storage_filesystem=filesystem,
                                  name=time.strftime("%Y%m%d-%H%M%S"), verbose=0, callbacks=loggers,
                                  checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                                  failure_config=tune.FailureConfig(max_failures=1)),
    )
    try:
        with stopping_on_signals(), out_of_memory_as_death():
            tuner.fit()
    except (KeyboardInterrupt, SystemExit):
        searcher.progress.echo("stopped by a signal; the same command goes on from the last finished round")
        raise
    return not searcher.finished


# ---- the study's directory ----


STALE_LOCK_S = 3.0
"""Optuna holds its lock for milliseconds."""


def remove_stale_lock(path: Path) -> bool:
    """Removes the lock that a killed writer left on the journal at `path`: one that stays the same for STALE_LOCK_S.

    Optuna would wait 30 s for it, and for ever, at full speed, where the link names a folder that was moved since.
    """
    lock = path.with_name(f"{path.name}.lock")
    before = [file.lstat().st_mtime_ns for file in (lock,) if file.is_symlink()]
    if not before:
        return False
    time.sleep(STALE_LOCK_S)
    if not lock.is_symlink() or lock.lstat().st_mtime_ns != before[0]:
        return False
    lock.unlink()
    return True


def repair_journal(path: Path) -> Path | None:
    """Cuts a torn last line off Optuna's journal, which would swallow the next writer's; returns the backup's path."""
    if not path.is_file():
        return None
    good = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        good += len(line)
    if good == path.stat().st_size:
        return None
    backup = path.with_name(f"{path.name}.torn-{time.strftime('%Y%m%d-%H%M%S')}")
    shutil.copy2(path, backup)
    os.truncate(path, good)
    return backup


class UploadedJournal(JournalFileBackend):
    """Optuna's journal on a store: this driver's copy, uploaded whole after every change, before the ledger hears of it. A
    kill between the two loses that change, which `StudySearcher` makes again from the ledger."""

    def __init__(self, path: StorePath) -> None:
        self._store_path = path
        super().__init__(str(pull(path)))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        super().append_logs(logs)
        persist(self._store_path, lambda: push(self._store_path))


def open_journal(ledger: Ledger, study: Study, echo: Callable[[str], None]) -> optuna.Study:
    """The study's Optuna journal: two objectives, size down and quality in its own direction."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # metric names, grouped TPE
    path = ledger.directory / "journal.log"  # absolute: a relative path makes Optuna's lock spin for ever
    if isinstance(path, Path) and remove_stale_lock(path):
        echo("the journal was locked by a driver that is gone; its lock is removed")
    if isinstance(path, Path) and (backup := repair_journal(path)) is not None:
        echo(f"the journal's last line was torn and is cut off; the file as it was is kept as {backup.name}")
    backend = JournalFileBackend(str(path)) if isinstance(path, Path) else UploadedJournal(path)
    direction = "maximize" if higher_is_better(study.objective) else "minimize"
    opened = optuna.create_study(storage=JournalStorage(backend), study_name="raysearch", directions=["minimize", direction],
                                 load_if_exists=True)
    opened.set_metric_names([study.size, study.objective])
    opened.sampler = optuna.samplers.TPESampler(
        seed=study.seed + len(opened.get_trials(deepcopy=False)), multivariate=True, group=True)
    return opened


def sample_trials(study: Study, space: Space, inputs: Inputs, num_trials: int) -> list[tuple[Action, ...]]:
    """Random draws from the space, resolved; ValueError of one sentence for a draw that contradicts itself."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dry = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [resolve_actions(draw(space, dry.ask()), study, inputs.num_train_tokens) for _ in range(num_trials)]


def draw(space: Space, trial: optuna.Trial) -> TrialConfig:
    """The configuration that `space` makes of one Optuna trial."""
    fields = space(trial)
    if not isinstance(fields, dict):
        raise ValueError(f"space(trial) must return a dict of trial settings, got {type(fields).__name__}")
    return parse(TrialConfig, fields, "space(trial)")


# ---- the searcher ----


class StudySearcher(Searcher):
    """Hands out jobs: the dense baseline, interrupted trials, new trials, and at the end the report of the frontier."""

    def __init__(self, ledger: Ledger, study: Study, space: Space, inputs: Inputs, echo: Callable[[str], None],
                 given: Sequence[TrialConfig] | None = None) -> None:
        super().__init__()
        self.ledger, self.study, self.space, self.inputs, self.given = ledger, study, space, inputs, given
        self.optuna = open_journal(ledger, study, echo)
        self.progress = Progress(ledger, study, inputs.root_key, echo)
        self.finished = False
        self.dense_failed = False
        """Twice, and left no record: then no trial can run."""
        self._deadline = time.monotonic() + study.time_budget_s if study.time_budget_s else None
        self._running: dict[str, Job] = {}
        self._reported: set[str] = set()
        self._interrupted = self._reap()
        known = len(self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))) + sum(
            trial.number in {t.number for t in ledger.trials()}
            for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.FAIL,)))
        self._num_asked = known

    def _reap(self) -> list[int]:
        """Trials that a dead driver left running: those with a record run again, the others never began."""
        recorded = {trial.number for trial in self.ledger.trials()}
        again = []
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in recorded:
                again.append(trial.number)
            else:
                self.optuna.tell(trial.number, state=TrialState.FAIL)
        return again

    def has_work(self) -> bool:
        """False when the study is finished and nothing needs to run."""
        return (bool(self._interrupted) or self._num_asked < self.study.num_trials
                or any(self.ledger.report_metrics(key) is None for key in self._to_report()))

    def _to_report(self) -> list[str]:
        return [self.inputs.root_key, *frontier_keys(self.ledger, self.study)]

    def suggest(self, trial_id: str) -> Job | str | None:
        job = self._next_job()
        if job is None:
            if self._running:
                return None
            self.finished = True
            return Searcher.FINISHED
        self._running[trial_id] = job
        self.progress.started(job)
        return job

    def _next_job(self) -> Job | None:
        if self.dense_failed:
            return None
        if self.ledger.report_metrics(self.inputs.root_key) is None and "dense" not in self._reported:
            self._reported.add("dense")
            return {"kind": "dense"}
        out_of_time = self._deadline is not None and time.monotonic() > self._deadline
        if self._interrupted and not out_of_time:
            return self._trial_job(self.ledger.trial(self._interrupted.pop(0)))
        if self._num_asked < self.study.num_trials and not out_of_time:
            return self._ask()
        if any(job["kind"] != "report" for job in self._running.values()):
            return None
        for key in self._to_report():
            if key not in self._reported and self.ledger.report_metrics(key) is None:
                self._reported.add(key)
                return {"kind": "report", "key": key}
        return None

    def _ask(self) -> Job:
        trial = self.optuna.ask()
        config = draw(self.space, trial) if self.given is None else self.given[self._num_asked]
        self._num_asked += 1
        actions = resolve_actions(config, self.study, self.inputs.num_train_tokens)
        record = TrialRecord(number=trial.number, config=config, actions=actions, started_at=utc_now())
        self.ledger.write_trial(record)
        return self._trial_job(record)

    def _trial_job(self, trial: TrialRecord) -> Job:
        return {"kind": "trial", "number": trial.number, "config_hash": config_hash(self.study, trial.actions)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """After every round but the last, which comes to `on_trial_complete`."""
        self.progress.round_done(self._running[trial_id])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job = self._running.pop(trial_id, None)
        if job is None:
            return
        if job["kind"] == "trial":
            self._tell(job["number"], error)
        elif error:
            self.dense_failed |= self.ledger.round(self.inputs.root_key) is None
            self.progress.echo(f"{job['kind']} job failed: {last_line(self.ledger.log_path(-1, 0))}")
        if result is not None or error:
            self.progress.ended(job, error)

    def _tell(self, number: int, error: bool) -> None:
        """Tells Optuna the trial's last candidate. A diverged trial is complete but infeasible, so the sampler learns
        from it; a crashed one is FAIL, which says nothing about its configuration."""
        trial = self.ledger.trial(number)
        stacks = self.ledger.stacks(number) if error else {}
        if trial.status == "running" and not error:
            return  # Tune was interrupted; the next sweep goes on
        if stacks:
            trial = trial.model_copy(update={"status": "failed", "ended_at": utc_now(), "reason": stuck(
                trial, self.study.round_limit_s, stacks), "traceback": "\n".join(
                    f"{rank}: {stack}" for rank, stack in stacks.items())})
            self.ledger.write_trial(trial)
        elif trial.status == "running":
            trial = trial.model_copy(update={"status": "failed", "ended_at": utc_now(), "reason":
                                             "its process died twice, killed or out of memory; the log is in log_path"})
            self.ledger.write_trial(trial)
        handle = optuna.Trial(self.optuna, self._trial_id(number))
        handle.set_user_attr("keys", list(trial.keys))
        if trial.reason:
            handle.set_user_attr("reason", trial.reason)
        if trial.status == "failed" and (error or trial.traceback):
            self.optuna.tell(number, state=TrialState.FAIL)
            return
        last = self.ledger.round(trial.keys[-1]) if trial.keys else self.ledger.round(self.inputs.root_key)
        assert last is not None
        handle.set_constraint("diverged", 1.0 if trial.status == "failed" else -1.0)
        self.optuna.tell(number, [getattr(last, self.study.size), last.metrics[self.study.objective].value])

    def _trial_id(self, number: int) -> int:
        return self.optuna.get_trials(deepcopy=False)[number]._trial_id

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal and the ledger are the state."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("run the same sweep again; it attaches to the journal and the ledger")

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """As `save`."""


NUM_FRAMES = 4


def stuck(trial: TrialRecord, limit_s: float, stacks: Mapping[str, str]) -> str:
    """One sentence: which round took too long, and the innermost frames of every rank that told."""
    where = []
    for rank, stack in stacks.items():
        main_thread = stack.rstrip().split("\n\n")[-1]  # faulthandler writes the oldest thread last
        frames = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', main_thread)[:NUM_FRAMES]
        where.append(f"{rank} in " + ", called by ".join(
            f"{name} ({Path(file).name}:{line})" for file, line, name in frames))
    return (f"round {len(trial.keys) + 1} took longer than round_limit_s = {limit_s:g} s, twice: {'; '.join(where)}; raise "
            "round_limit_s if it was only slow")


def frontier_keys(ledger: Ledger, study: Study) -> list[str]:
    """Keys of the candidates that no other one beats in both size and objective on the selection split; never one that
    a race stopped, whose metrics (which the sampler does learn from) are of some items only."""
    rounds = [r for r in ledger.rounds().values() if study.objective in r.metrics and r.dominated_by is None]
    sign = 1 if higher_is_better(study.objective) else -1
    on_front = pareto_front([getattr(r, study.size) for r in rounds],
                            [sign * r.metrics[study.objective].value for r in rounds])
    return [r.key for r, front in zip(rounds, on_front) if front]


def delete_unneeded(ledger: Ledger, study: Study, keep: Keep, echo: Callable[[str], None]) -> None:
    """Deletes the weights of candidates that `keep` does not name and from which no unfinished trial goes on."""
    needed = set(frontier_keys(ledger, study)) if keep == "frontier" else set()
    root_key = ledger.study().root_key
    for trial in ledger.trials():
        if trial.status == "running":
            needed.add(last_finished(ledger, root_key, trial))
    num_files, num_bytes = ledger.delete_weights(sorted(set(ledger.rounds()) - needed))
    echo(f"--keep {keep}: deleted {num_files} files of weights, {human_bytes(num_bytes)}; records stay, and export computes "
         "weights again")


def last_finished(ledger: Ledger, root_key: str, trial: TrialRecord) -> str:
    """Key of the candidate from which a trial that runs again goes on."""
    key = root_key
    for action in trial.actions:
        following = round_key(key, action)
        if ledger.round(following) is None:
            return key
        key = following
    return key


class Progress:
    """Plain lines for a terminal and a job log alike: what ran, what is left, the best so far."""

    def __init__(self, ledger: Ledger, study: Study, root_key: str, echo: Callable[[str], None]) -> None:
        self.ledger, self.study, self.root_key, self.echo = ledger, study, root_key, echo
        self.began = time.monotonic()
        self._gangs_ready_s: float | None = None
        self.count = {"running": 0, "done": 0, "stopped": 0, "failed": 0}
        for trial in ledger.trials():
            self.count[trial.status] += trial.status != "running"
        self._before = self.count["done"] + self.count["stopped"] + self.count["failed"]

    def started(self, job: Job) -> None:
        self.count["running"] += job["kind"] == "trial"

    def round_done(self, job: Job) -> None:
        trial = self.ledger.trial(job["number"])
        self._line(f"trial {trial.number} round {len(trial.keys)}/{len(trial.actions)}", trial.keys[-1])

    def ended(self, job: Job, error: bool) -> None:
        if job["kind"] == "trial":
            trial = self.ledger.trial(job["number"])
            self.count["running"] -= 1
            self.count[trial.status] += trial.status != "running"
            if trial.status == "failed":
                self.echo(f"trial {trial.number} failed: {trial.reason}")
        elif not error:
            self._line("dense baseline" if job["kind"] == "dense" else "report split", job.get("key", self.root_key))

    def _line(self, what: str, key: str) -> None:
        candidate = self.ledger.candidate(key)
        metric = candidate.metrics.get(self.study.objective)
        quality = f"{self.study.objective} {metric.value:.4f}" if metric else ""
        ended = self.count["done"] + self.count["stopped"] + self.count["failed"]
        elapsed = time.monotonic() - self.began
        left = ""
        if self._gangs_ready_s is None:
            self._gangs_ready_s = elapsed
        elif ended > self._before:
            to_do = max(0, self.study.num_trials - ended - self.count["running"] / 2)  # what runs is half done
            left = f", about {(elapsed - self._gangs_ready_s) / (ended - self._before) * to_do:.0f} s left"
        counts = ", ".join(f"{n} {status}" for status, n in self.count.items())
        self.echo(f"[{elapsed:4.0f} s] {what}: sparsity {candidate.sparsity:.3f} {quality} | trials: {counts} of "
                  f"{self.study.num_trials}{left}")
