"""A whole sweep, what can be seen of it while it runs and after (TensorBoard, logs, optuna-dashboard), and no secret in it."""

import io
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import wait_until
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna_dashboard import wsgi
from sweeps import check_whole, finish, sweep, write_space

from raysearch.study.ledger import Ledger

SECRETS = {"HF_TOKEN": "hf_planted6b1f0a", "WANDB_API_KEY": "planted0c4d7e52", "AWS_SECRET_ACCESS_KEY": "planted77aa9911"}


@dataclass
class Watched:
    folder: Path
    ledger: Ledger
    out: str
    while_running: dict
    """optuna-dashboard's answer while trials ran."""


def dashboard(journal: Path, path: str) -> dict:
    """The answer of optuna-dashboard's own web application."""
    app = wsgi(JournalStorage(JournalFileBackend(str(journal))))
    status: list[str] = []
    body = b"".join(app({"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": "", "SERVER_NAME": "x", "SERVER_PORT": "1",
                         "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(), "wsgi.errors": sys.stderr},
                        lambda line, headers, *_: status.append(line)))
    assert status == ["200 OK"], body
    return json.loads(body)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, stories: Path) -> Watched:
    """A sweep of three trials, watched while it ran, with secrets in its environment."""
    folder = tmp_path_factory.mktemp("watched")
    write_space(folder, tiny_model, stories, num_trials=3)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        process = sweep(folder, "--keep", "frontier")
    seen = {}
    while process.poll() is None and not seen:
        time.sleep(0.2)
        journal = folder / "study" / "journal.log"
        if journal.is_file() and list((folder / "study" / "trials").glob("*.json")):
            seen = dashboard(journal, "/api/studies")
    code, out, err = finish(process)
    assert code == 0, out + err
    return Watched(folder, Ledger.open(folder / "study"), out, seen)


def test_the_time_left_counts_from_the_first_line(watched: Watched) -> None:
    pattern = r"\[ *(\d+) s\] .* (\d+) running, (\d+) done, (\d+) stopped, (\d+) failed of 3"
    pattern += r"(?:, about (\d+) s left, and the report split)?$"
    found = [re.match(pattern, line) for line in watched.out.splitlines()]
    lines = [[int(number or -1) for number in line.groups()] for line in found if line]
    told = [line for line in lines if line[5] >= 0]
    assert told
    for elapsed_s, running, done, stopped, failed, left_s in told:
        ended = done + stopped + failed
        expected_s = (elapsed_s - lines[0][0]) / ended * (3 - ended - running / 2)
        control_s = max(trial.seconds for trial in watched.ledger.trials())  # once one has ended
        assert expected_s - 3.5 <= left_s <= expected_s + control_s + 3.5  # the seconds of two lines are rounded


def test_a_study_is_whole_and_found_finished(watched: Watched) -> None:
    check_whole(watched.folder, 3)
    assert "trial 1 failed: round 1" in watched.out
    before = {path: path.stat().st_mtime_ns for path in watched.ledger.directory.glob("rounds/*/*")}
    started = time.monotonic()
    code, out, err = finish(sweep(watched.folder))  # nothing is left to do, so Ray does not even start
    assert code == 0, err
    assert "resuming" in out
    assert time.monotonic() - started < 60
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_optuna_dashboard_opens_the_journal(watched: Watched) -> None:
    (summary,) = watched.while_running["study_summaries"]
    assert (summary["study_name"], summary["directions"]) == ("raysearch", ["minimize", "minimize"])
    study = dashboard(watched.ledger.directory / "journal.log", f"/api/studies/{summary['study_id']}")
    assert [trial["state"] for trial in study["trials"]] == ["Complete"] * 3
    assert study["objective_names"] == ["num_nonzero", "text/bits_per_byte"]


def test_tensorboard_has_every_round(watched: Watched) -> None:
    trial = watched.ledger.trial(0)
    (events,) = watched.ledger.directory.glob("tune/study trial 0/events.out.tfevents.*")
    data = events.read_bytes()
    assert all(name in data for name in (b"sparsity", b"text/bits_per_byte", b"report/text/bits_per_byte", b"learning_rate"))
    assert all(key.encode() in data for key in trial.keys)
    assert not any(name in data for name in (b"pid", b"timestamp", b"time_since_restore", b"config_hash"))
    assert len(list(watched.ledger.directory.glob("tune/*/events.*"))) == 1 + 3  # the dense baseline, and each trial once


def test_logs_are_in_the_study(watched: Watched) -> None:
    for trial in watched.ledger.trials():
        assert Path(trial.log_path) == watched.ledger.log_path(trial.number, 0)
        assert Path(trial.log_path).is_file()


def test_no_secret_is_written(watched: Watched) -> None:
    assert not any(value in watched.out for value in SECRETS.values())
    for path in watched.ledger.directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_keep_frontier_says_what_it_deleted(watched: Watched) -> None:
    (line,) = [line for line in watched.out.splitlines() if line.startswith("--keep frontier: deleted ")]
    kept = {path.parent.name for path in watched.ledger.directory.glob("rounds/*/weights.safetensors")}
    reported = {path.parent.name for path in watched.ledger.directory.glob("rounds/*/report.json")}
    assert kept == reported - {watched.ledger.study().root_key}
    assert f"deleted {len(watched.ledger.rounds()) - 1 - len(kept)} files" in line


@pytest.mark.slow
def test_a_killed_and_resumed_study_has_one_run_for_each_trial(tmp_path: Path, tiny_model: Path, stories: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=1)
    options = ("--mlflow", f"sqlite:///{tmp_path}/runs.db", "--wandb", "project")
    first, record = sweep(tmp_path, *options), tmp_path / "study" / "trials" / "00000.json"
    wait_until(lambda: record.is_file() and '"keys": []' not in record.read_text(), first)
    first.kill()
    first.communicate()
    code, out, err = finish(sweep(tmp_path, *options))
    assert code == 0, out + err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    runs = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    assert {(run.info.run_name, run.info.status) for run in runs} == {
        ("study dense", "FINISHED"), ("study trial 0", "FINISHED"), ("study trial 1", "FAILED"), ("study trial 2", "FINISHED")}
    assert len(runs) == len(list((tmp_path / "wandb").glob("offline-run-*"))) == 4
    for trial in Ledger.open(tmp_path / "study").trials():
        (run,) = [run for run in runs if run.info.run_name == f"study trial {trial.number}"]
        assert run.data.params["learning_rate"] == str(trial.config.learning_rate)
        assert [run.data.tags[f"key {depth}"] for depth in range(1, len(trial.keys) + 1)] == list(trial.keys)
