"""What TensorBoard, MLflow and W&B have of a study, read back from their own files; made-up rounds, real trackers."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from synthetic_study import SyntheticStudy
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

import raysearch.search.sweep
from raysearch.config import study_of
from raysearch.search.loggers import Loggers, trackers
from raysearch.study.ledger import Ledger

FIELDS = {"target_sparsity": 0.5, "schedule": "linear", "finetune_epochs": 1.0, "num_rounds": 2, "learning_rate": 3e-4,
          "criterion": "magnitude"}


def begun(folder: Path) -> SyntheticStudy:
    """The dense baseline, trial 0 with two rounds done, and trial 1, which has finished one of two."""
    study = SyntheticStudy(folder)
    study.dense(report=False)
    study.trial(0, [0.25, 0.5], schedule="linear", finetune_epochs=1.0)
    study.trial(1, [0.3, 0.6], schedule="linear", status="running", num_finished=1)
    return study


def ended(study: SyntheticStudy) -> None:
    """Trial 1 goes on to its end, trial 2 fails, and the report split is scored."""
    study.trial(0, [0.25, 0.5], schedule="linear", finetune_epochs=1.0, report=True)
    study.trial(1, [0.3, 0.6], schedule="linear")
    study.trial(2, [0.9], status="failed", num_finished=0, reason="round 1: the loss became nan")


def _killed(folder: Path, asked: dict[str, str | None]) -> None:
    shown = Loggers(Ledger(folder), trackers(folder, **asked), print)
    for number in (None, 0, 1):
        shown.show(number)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_and_resumed(folder: Path, **asked: str | None) -> tuple[SyntheticStudy, list[str]]:
    """A sweep that is killed in trial 1, and the same again; what was said."""
    study, said = begun(folder), []
    first = multiprocessing.get_context("spawn").Process(target=_killed, args=(folder, asked))
    first.start()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    second = Loggers(Ledger(folder), trackers(folder, **asked), said.append)
    second.show(1)
    ended(study)
    second.show(1)
    second.show_all()
    second.show_all()
    return study, said


def test_mlflow_has_one_finished_run_for_each_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/runs.db"
    study, said = killed_and_resumed(tmp_path / "mine", mlflow_uri=uri, wandb_project=None)
    client = mlflow.MlflowClient(uri)
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("mine").experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "mine dense": "FINISHED", "mine trial 0": "FINISHED", "mine trial 1": "FINISHED", "mine trial 2": "FAILED"}
    first = runs["mine trial 0"].data
    assert first.params.items() >= {name: str(value) for name, value in FIELDS.items()}.items()
    trial = study.ledger.trial(0)
    assert [first.tags[f"key {depth}"] for depth in (1, 2)] == list(trial.keys)
    assert runs["mine trial 2"].data.tags["reason"] == "round 1: the loss became nan"
    for number, name in ((0, "mine trial 0"), (1, "mine trial 1")):
        rounds = [study.ledger.candidate(key) for key in study.ledger.trial(number).keys]
        history = client.get_metric_history(runs[name].info.run_id, "text/bits_per_byte")
        assert [(each.step, each.value) for each in history] == [
            (each.depth, each.metrics["text/bits_per_byte"].value) for each in rounds]
    assert first.metrics["report/text/bits_per_byte"] == study.ledger.report_metrics(trial.keys[-1])["text/bits_per_byte"].value
    assert not {"pid", "timestamp", "depth", "date", "done"} & set(first.metrics)
    assert said == []


def leveldb_records(data: bytes, start: int = 7, block: int = 32768) -> Iterator[bytes]:
    """Of a log in LevelDB's format behind W&B's header: blocks of fragments, each behind a checksum, a length and a type."""
    parts = b""
    while start < len(data):
        if block - start % block < 7:  # no room for another header
            start += block - start % block
            continue
        length, kind = int.from_bytes(data[start + 4:start + 6], "little"), data[start + 6]
        parts += data[start + 7:start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # whole, or the last
            yield parts
            parts = b""


def wandb_rows(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any], int | None]:
    """(rows of the history, configuration, exit code) of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, config, code = [], {}, None
    for data in leveldb_records(file.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item})
        elif kind == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "exit":
            code = record.exit.exit_code
    return rows, config, code


def test_wandb_has_one_finished_run_for_each_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    study, said = killed_and_resumed(tmp_path / "mine", mlflow_uri=None, wandb_project="project")
    found = {folder.name.rpartition("-")[2]: wandb_rows(next(folder.glob("*.wandb")))
             for folder in (tmp_path / "wandb").glob("offline-run-*")}
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == len(found) == 4
    assert {number: code for number, (_, _, code) in found.items()} == {"dense": 0, "0": 0, "1": 0, "2": 1}
    for number in ("0", "1"):
        rows, config, _ = found[number]
        trial = study.ledger.trial(int(number))
        assert [(row["round"], row["key"]) for row in rows] == list(enumerate(trial.keys, start=1))
        assert config["target_sparsity"] == trial.config.target_sparsity
    assert found["0"][1].items() >= FIELDS.items()
    assert "report/text/bits_per_byte" in found["0"][0][-1]
    assert said == []


def events(folder: Path) -> Iterator[Event]:
    (file,) = folder.glob("events.out.tfevents.*")
    data = file.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12:12 + length])
        data = data[16 + length:]


def test_tensorboard_has_every_round_and_setting_once(tmp_path: Path) -> None:
    study, _ = killed_and_resumed(tmp_path / "mine", mlflow_uri=None, wandb_project=None)
    folders = {folder.name: list(events(folder)) for folder in (tmp_path / "mine" / "tune").iterdir()}
    assert set(folders) == {"mine dense", "mine trial 0", "mine trial 1", "mine trial 2"}
    found = [(value.tag, event.step, value) for event in folders["mine trial 0"] for value in event.summary.value]
    bits = [(step, value.simple_value) for tag, step, value in found if tag == "text/bits_per_byte"]
    rounds = [study.ledger.candidate(key) for key in study.ledger.trial(0).keys]
    assert bits == [(each.depth, pytest.approx(each.metrics["text/bits_per_byte"].value)) for each in rounds]
    assert "report/text/bits_per_byte" in {tag for tag, *_ in found}
    keys = [value.tensor.string_val[0].decode() for tag, _, value in found if tag.startswith("key")]
    assert keys == [each.key for each in rounds]
    start = next(HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info
                 for tag, _, value in found if "session_start_info" in tag)
    assert start.hparams["target_sparsity"].number_value == 0.5
    assert start.hparams["schedule"].string_value == "linear"


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    study, said = begun(tmp_path / "mine"), []
    made = Loggers(study.ledger, trackers(study.ledger.directory, f"sqlite:///{tmp_path}/runs.db", None), said.append)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    client.delete_experiment(client.create_experiment("mine"))
    for number in (0, 1):
        made.show(number)
    assert [line.partition(" (")[0] for line in said] == ["MLflow takes no more of this sweep"]
    assert len(list((tmp_path / "mine" / "tune").iterdir())) == 2  # TensorBoard goes on


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """HOST:PORT that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_target_that_cannot_be_used_is_told_within_seconds_and_before_anything_is_written(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(sentence: str, **asked: str) -> None:
        started = time.monotonic()
        with pytest.raises(ValueError, match=sentence) as caught:
            raysearch.search.sweep.sweep("s", tmp_path / "study", study_of(path="m"), lambda trial: {}, print, **asked)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - started < 20
        assert not (tmp_path / "study").exists()

    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        refused("--mlflow needs the package mlflow, which is not installed here: pip install mlflow", mlflow_uri="sqlite:///x")
        refused("--wandb needs the package wandb", wandb_project="project")
    pytest.importorskip("mlflow")
    ways = "give sqlite:///FILE, or http://HOST:PORT of an MLflow server"
    with silent_server() as address:
        refused(f"cannot be used .timed out.; {ways}", mlflow_uri=f"http://{address}")
    for uri in (f"http://{address}", str(tmp_path), f"file://{tmp_path}/runs", "ftp://x", "nonsense://x", f"sqlite:///{tmp_path}",
                "sqlite:///no/folder/x.db", "http://", "postgresql+psycopg2://127.0.0.1:9/x"):
        refused(f"--mlflow {re.escape(uri)}: cannot be used .*; {ways}", mlflow_uri=uri)
    refused(r"--mlflow mysql://\.\.\.@127.0.0.1:9/x: cannot be used", mlflow_uri="mysql://user:secret@127.0.0.1:9/x")
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    with silent_server() as address:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{address}")
        refused("--wandb project: http://.* does not answer .timed out.; .* set WANDB_MODE=offline", wandb_project="project")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        refused("--wandb project: nobody is logged in here; give WANDB_API_KEY", wandb_project="project")
