"""Where a sweep shows its trials beside the ledger: TensorBoard, and on demand MLflow and Weights & Biases.

Each trial is one run there, named by study and number: its settings, one step for each round, the report scores of its rounds.
A run is a view of the ledger. What a tracker has of it already is not logged again, so a resumed study goes on with its runs.
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raysearch.study.ledger import Ledger
from raysearch.study.records import TrialRecord, hash_json
from raysearch.study.storage import AnyPath
from raysearch.study.text import first_line
from raysearch.trial.rank import measured

ANSWER_S = 5
"""Longest wait for a tracker, in seconds."""


@dataclass(frozen=True)
class Run:
    """A trial, a dense control, or the dense baseline."""

    id: str
    """Of the study, wherever it lies, and the trial."""
    name: str
    parameters: dict[str, str | int | float | bool]
    rounds: dict[int, tuple[str, dict[str, float]]]
    """Round -> (key, numbers); the dense baseline is round 0."""
    reports: dict[int, dict[str, float]]
    """Round -> scores on the report split, as "report/TASK/METRIC"."""
    status: str
    reason: str | None


class Tracker(Protocol):
    def show(self, run: Run) -> None:
        """Brings the run up to date."""


class Loggers:
    """Shows the study of `ledger` on each tracker. One that fails is told once and left: no study ends by it."""

    def __init__(self, ledger: Ledger, trackers: Sequence[Tracker], echo: Callable[[str], None]) -> None:
        self.ledger, self.trackers, self.echo = ledger, list(trackers), echo
        self._shown: dict[str, Run] = {}

    def show(self, number: int | None) -> None:
        """The trial or control of this number; None is the dense baseline."""
        record = self.ledger.study()
        if number is None:
            dense = self.ledger.round(record.root_key)
            name, parameters, keys, status, reason = "dense", {}, [record.root_key] * (dense is not None), "done", None
        else:
            trial = self.ledger.trial(number)
            name, parameters, keys, status, reason = trial.name, settings(trial), trial.keys, trial.status, trial.reason
        rounds = {record.depth: record for record in map(self.ledger.candidate, keys)}
        reports = {depth: self.ledger.report_metrics(each.key) or {} for depth, each in rounds.items()}
        self._show(Run(
            id=f"{hash_json([record.root_key, record.provenance.created_at])}-{number if number is not None else 'dense'}",
            name=f"{self.ledger.directory.name} {name}", parameters=parameters,
            rounds={depth: (each.key, {what: float(value) for what, value in measured(each).items() if what != "depth"})
                    for depth, each in rounds.items()},
            reports={depth: {f"report/{metric}": value.value for metric, value in report.items()}
                     for depth, report in reports.items() if report},
            status=status, reason=reason))

    def _show(self, run: Run) -> None:
        if self._shown.get(run.id) == run or (not run.rounds and run.name.endswith(" dense")):
            return
        self._shown[run.id] = run
        for tracker in list(self.trackers):
            try:
                tracker.show(run)
            except Exception as error:  # of any kind: each package has its own, and a study of days must not end by one
                self.trackers.remove(tracker)
                self.echo(f"{type(tracker).__name__} takes no more of this sweep ({first_line(error)}); the same command "
                          "logs the rest")

    def show_all(self) -> None:
        """Also what earlier sweeps left unfinished, and the report scores that came after a trial's end."""
        self.show(None)
        for trial in [*self.ledger.trials(), *self.ledger.controls()]:
            self.show(trial.number)


def settings(trial: TrialRecord) -> dict[str, str | int | float | bool]:
    """What was sampled, and the settings that the space made of it; of given actions, these as JSON."""
    if trial.config is None:
        return {"actions": json.dumps([action.model_dump(mode="json", exclude_defaults=True) for action in trial.actions])}
    return {**trial.parameters, **trial.config.model_dump(mode="json", exclude_none=True)}


def trackers(directory: AnyPath, mlflow_uri: str | None, wandb_project: str | None) -> list[Tracker]:
    """TensorBoard's and those asked for; ValueError of one sentence for one that cannot be reached, within seconds."""
    made: list[Tracker] = [TensorBoard(directory / "tune")]
    for package, value, tracker in (("mlflow", mlflow_uri, MLflow), ("wandb", wandb_project, WandB)):
        if value is None:
            continue
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--{package} needs the package {package}, which is not installed here: pip install {package}")
        made.append(tracker(value, directory.name))
    return made


def check_target(uri: str) -> None:
    """Raises an error of any kind, within seconds, for a server or a database that does not answer; MLflow asks a database for
    minutes."""
    if uri.startswith(("http://", "https://")):
        with contextlib.suppress(urllib.error.HTTPError):  # an answer
            urllib.request.urlopen(uri, timeout=ANSWER_S).close()
    elif "://" in uri and not uri.startswith(("file:", "databricks")):
        from sqlalchemy import create_engine, make_url

        url = make_url(uri)
        if url.host and url.port:
            socket.create_connection((url.host, url.port), ANSWER_S).close()
        create_engine(url).connect().close()


class TensorBoard:
    """Event files in FOLDER/RUN; one that is written again replaces the one before."""

    def __init__(self, folder: AnyPath) -> None:
        self.folder = folder
        self._opened: dict[str, tuple[Any, Path, set[tuple[str, int]]]] = {}

    def show(self, run: Run) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        folder = self.folder / run.name
        if run.id not in self._opened:
            self._opened[run.id] = self._open(folder)
        writer, local, logged = self._opened[run.id]
        found = [(depth, summary.scalar(name, value)) for depth, name, value in _new(run, logged)]
        if run.status != "running":
            last = max(run.rounds, default=0)
            found += [(depth, summary.text("key", key)) for depth, (key, _) in run.rounds.items()]
            found += [(last, each) for each in summary.hparams(run.parameters, run.rounds[last][1] if last else {})]
        for depth, each in found:
            writer.write_event(Event(wall_time=time.time(), step=depth, summary=each))
        writer.flush()
        if not isinstance(folder, Path):
            for file in local.iterdir():
                (folder / file.name).upload(file)
        if run.status != "running":
            writer.close()
            del self._opened[run.id]

    @staticmethod
    def _open(folder: AnyPath) -> tuple[Any, Path, set[tuple[str, int]]]:
        from tensorboardX.event_file_writer import EventsWriter

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        local = folder if isinstance(folder, Path) else Path(tempfile.mkdtemp(prefix="raysearch-"))
        local.mkdir(parents=True, exist_ok=True)
        return EventsWriter(str(local / "events")), local, set()


def _new(run: Run, logged: set[tuple[str, int]]) -> list[tuple[int, str, float]]:
    """(round, name, value) of what is not in `logged`, which has them from then on."""
    found = [(depth, name, value) for depth, (_, numbers) in run.rounds.items()
             for name, value in {**numbers, **run.reports.get(depth, {})}.items() if (name, depth) not in logged]
    logged.update((name, depth) for depth, name, _ in found)
    return found


class MLflow:
    """Runs of the experiment that has the study's name, found again by a tag."""

    def __init__(self, uri: str, experiment: str) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(ANSWER_S))  # MLflow's own: two minutes, seven times
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        try:
            check_target(uri)
            self.client = MlflowClient(tracking_uri=uri)
            self.client.search_experiments(max_results=1)
        except Exception as error:  # MLflow's own, SQLAlchemy's and those of a driver that is missing
            shown = re.sub(r"://[^/@]*@", "://...@", uri)  # without a password
            raise ValueError(f"--mlflow {shown}: cannot be used ({first_line(error)}); give sqlite:///FILE, or "
                             "http://HOST:PORT of an MLflow server") from error
        self.name = experiment
        self._runs: dict[str, tuple[str, set[tuple[str, int]]]] = {}

    def show(self, run: Run) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if run.id not in self._runs:
            self._runs[run.id] = self._find_or_create(run)
        run_id, logged = self._runs[run.id]
        now = int(time.time() * 1000)
        tags = {f"key {depth}": key for depth, (key, _) in run.rounds.items()} | ({"reason": run.reason} if run.reason else {})
        self.client.log_batch(run_id, [Metric(name, value, now, depth) for depth, name, value in _new(run, logged)],
                              [Param(name, str(value)[:MAX_PARAM_CHARS]) for name, value in run.parameters.items()],
                              [RunTag(name, value) for name, value in tags.items()])
        if run.status == "running":
            self.client.update_run(run_id, status="RUNNING")
        else:
            self.client.set_terminated(run_id, "FAILED" if run.status == "failed" else "FINISHED")

    def _find_or_create(self, run: Run) -> tuple[str, set[tuple[str, int]]]:
        experiment = self.client.get_experiment_by_name(self.name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(self.name)
        found = self.client.search_runs([experiment_id], f"tags.raysearch = '{run.id}'", max_results=1)
        if not found:
            tags = {"raysearch": run.id}
            return self.client.create_run(experiment_id, run_name=run.name, tags=tags).info.run_id, set()
        run_id = found[0].info.run_id
        return run_id, {(name, metric.step) for name in found[0].data.metrics
                        for metric in self.client.get_metric_history(run_id, name)}


MAX_PARAM_CHARS = 6000
"""MLflow refuses longer values."""


class WandB:
    """Runs with ids of their own, which W&B goes on with; of a run that is written again offline, the folder before it goes."""

    def __init__(self, project: str, group: str) -> None:
        import wandb

        self.project, self.group = project, group
        if os.environ.get("WANDB_MODE", "online") == "online":
            server = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
            offline = "or set WANDB_MODE=offline to log to a folder"
            try:
                check_target(server)
            except OSError as error:
                raise ValueError(f"--wandb {project}: {server} does not answer ({first_line(error)}); check the network, "
                                 f"{offline}") from error
            if not wandb.login(prompt=False):
                raise ValueError(f"--wandb {project}: nobody is logged in here; give WANDB_API_KEY, `wandb login`, {offline}")
        self._opened: dict[str, tuple[Any, set[tuple[str, int]]]] = {}

    def show(self, run: Run) -> None:
        if run.id not in self._opened:
            self._opened[run.id] = self._open(run)
        opened, logged = self._opened[run.id]
        rows: dict[int, dict[str, Any]] = {}
        for depth, name, value in _new(run, logged):
            rows.setdefault(depth, {"round": depth, "key": run.rounds[depth][0]})[name] = value
        for depth in sorted(rows):
            opened.log(rows[depth])
        if run.status != "running":
            opened.finish(exit_code=int(run.status == "failed"))
            del self._opened[run.id]

    def _open(self, run: Run) -> tuple[Any, set[tuple[str, int]]]:
        import wandb

        opened = wandb.init(project=self.project, group=self.group, id=run.id, name=run.name, config=run.parameters,
                            resume="allow", reinit="create_new", notes=run.reason,
                            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True))
        opened.define_metric("*", step_metric="round")
        logged: set[tuple[str, int]] = set()
        if opened.offline:
            folder = Path(opened.dir).parent
            for old in set(folder.parent.glob(f"offline-run-*-{run.id}")) - {folder}:
                shutil.rmtree(old, ignore_errors=True)
        for depth in sorted(run.rounds)[:opened.starting_step]:  # rows that W&B has: the rounds' come first
            logged.update((name, depth) for name in run.rounds[depth][1])
        return opened, logged
