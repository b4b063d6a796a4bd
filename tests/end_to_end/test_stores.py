"""A study on a real S3 server (moto's, in this process): the commands, faults, and what is refused."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
import ray
import torch
from faults import inject, wait_until
from moto.server import ThreadedMotoServer
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState
from sweeps import finish, sweep, write_space
from test_faults import ACTION, HANG, SLOW_ROUNDS
from test_nodes import Cluster, cluster, homes  # noqa: F401
from typer.testing import CliRunner

import raysearch
from raysearch.cli import app
from raysearch.cluster.doctor import check_storage, check_store
from raysearch.deploy.export import export
from raysearch.models.weights import read_weights
from raysearch.study import lease
from raysearch.study.files import new_file, persist, write_json
from raysearch.study.lease import holder
from raysearch.study.ledger import Ledger
from raysearch.study.storage import StorePath, as_file, location, pull, push
from raysearch.trial.round import dense_round, run_round
from raysearch.trial.worker import Worker

SECRET = "planted0f3c9a77"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """HOST:PORT of an S3 server that holds "bucket", with credentials for it in the environment."""
    started = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    started.start()
    address = "{}:{}".format(*started.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_CONFIG_FILE": os.devnull,
                            "AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": os.devnull}.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)
        request(f"http://{address}/bucket", "PUT")
        yield address
    started.stop()


def request(url: str, method: str, data: bytes | None = None) -> None:
    urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "text/plain"}, method=method)).close()


@pytest.fixture
def folder(server: str, tmp_path: Path) -> StorePath:
    """An empty one of its own in the store."""
    found = location(f"s3://bucket/{tmp_path.name}/x?endpoint_override={server}&scheme=http")
    assert isinstance(found, StorePath)
    return found


@pytest.fixture
def refusing(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Call it: from now on, and for `seconds`, the server refuses this process's credentials."""
    monkeypatch.setattr(raysearch.study.files, "WRITE_RETRY_S", 0.5)

    def after(num_requests: str) -> None:
        request(f"http://{server}/moto-api/reset-auth", "POST", num_requests.encode())

    timers: list[threading.Timer] = []

    def refuse(seconds: float) -> None:
        after("0")
        timers.append(threading.Timer(seconds, after, ("1e9",)))
        timers[-1].start()

    yield refuse
    for timer in timers:
        timer.cancel()
    after("1e9")


# ---- paths ----


def test_paths_are_those_of_pathlib(folder: StorePath, tmp_path: Path) -> None:
    seen = []
    for root in (folder, tmp_path / "x"):
        assert not root.exists()
        assert list(root.glob("*")) == []
        write_json(root / "rounds" / "k1" / "record.json", {"a": 1})
        (root / "rounds" / "k1" / "weights.bin").write_bytes(b"123")
        write_json(root / "rounds" / ".k2" / "record.json", {})
        write_json(root / "lock", {})
        assert root.is_dir()
        assert not root.is_file()
        (found,) = (root / "rounds").glob("[!.]*/record.json")
        assert found.parent.name == "k1"
        assert json.loads(found.read_text()) == {"a": 1}
        assert abs(found.stat().st_mtime - time.time()) < 60
        weights = root / "rounds" / "k1" / "weights.bin"
        weights.replace(weights.with_suffix(".damaged"))
        assert not weights.exists()
        for act in (weights.unlink, weights.read_bytes, weights.stat):
            with pytest.raises(FileNotFoundError) as error:
                act()
            assert str(error.value.filename) == str(weights)
        weights.unlink(missing_ok=True)
        seen.append((sorted(path.name for path in root.iterdir()), sorted(
            (path.name, path.stem, path.suffixes, path.stat().st_size) for path in (root / "rounds").glob("*/*"))))
    assert seen[0] == seen[1]
    assert str(folder / "a" / "b.json") == str(location(str(folder / "a" / "b.json")))
    assert location(str(folder / "rounds" / "k1" / "record.json")).read_text() == '{\n "a": 1\n}'


def test_objects_are_whole(folder: StorePath, tmp_path: Path) -> None:
    data = os.urandom(22_345_678)  # three parts of an upload
    with new_file(folder / "big") as file:
        file.write_bytes(data)
    with as_file(folder / "big") as local:
        assert local.read_bytes() == data
    assert not local.exists()
    with pytest.raises(RuntimeError, match="boom"), new_file(folder / "big") as file:
        file.write_bytes(b"half")
        raise RuntimeError("boom")
    assert (folder / "big").stat().st_size == len(data)

    def interrupt(number: int, frame: object) -> None:
        raise SystemExit(number)

    (tmp_path / "new").write_bytes(b"new" * 5_000_000)
    (tmp_path / "newer").write_bytes(b"newer")
    before = signal.signal(signal.SIGALRM, interrupt)
    delays_ms = [("new", 5.0), ("new", 50.0), ("new", 100.0), *(("newer", 0.1 * step) for step in range(1, 100))]
    for name, delay_ms in delays_ms:
        signal.setitimer(signal.ITIMER_REAL, delay_ms / 1000)
        with contextlib.suppress(SystemExit, RuntimeError):  # the second comes of a lock that was interrupted
            (folder / "big").upload(tmp_path / name)
            time.sleep(0.1)
        assert (folder / "big").stat().st_size in (len(data), 15_000_000, 5)
    signal.signal(signal.SIGALRM, before)

    log = folder / "a.log"
    pull(log).write_text("")
    push(log)
    with open(pull(log), "a") as file:
        file.write("more")
    push(log)
    assert log.read_text() == "more"


def test_a_file_uri_is_a_local_path(tmp_path: Path) -> None:
    assert location(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert location("studies/x") == Path("studies/x").resolve()


@pytest.mark.parametrize(("uri", "sentence"), [
    (f"s3://KEY:{SECRET}@bucket/x", "a URI must hold no credentials.*environment .on S3 AWS_ACCESS_KEY_ID"),
    (f"s3://KEY:a/{SECRET}@bucket/x", "a URI must hold no credentials"),
    (f"gs://{SECRET}@bucket/x", "a URI must hold no credentials"),
    (f"s3://bucket/x?secret_key={SECRET}", "a URI must hold no credentials"),
    (f"abfs://container@account.dfs.core.windows.net/x?sas_token={SECRET}", "a URI must hold no credentials"),
    ("ftp://host/x", "ftp://host/x: pyarrow cannot open it.*give a folder, or a URI such as s3://"),
    ("s3://bucket/x?endpoint=localhost", "pyarrow cannot open it .*endpoint"),
    ("s3:///x", "pyarrow cannot open it|names no bucket"),
    ("s3://", "names no bucket"),
    (Path("s3://bucket/x"), "s3:/bucket/x: only a study's directory can be a URI"),
])
def test_uris_that_cannot_be_used(uri: str | Path, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        location(uri)
    assert SECRET not in str(error.value)


def test_refusals_are_one_sentence(server: str, folder: StorePath, refusing: Callable[[float], None]) -> None:
    query = f"endpoint_override={server}&scheme=http"
    missing = location(f"s3://nowhere/x?{query}") / "a"
    with pytest.raises(OSError, match="the bucket does not exist; create it") as error:
        missing.write_bytes(b"x")
    assert error.value.filename == str(missing)
    with pytest.raises(ValueError, match="no such study directory"):
        Ledger.open(f"s3://nowhere/x?{query}")
    with pytest.raises(OSError, match="the store does not answer; check endpoint_override"):
        (location("s3://bucket/x?endpoint_override=127.0.0.1:1&scheme=http") / "a").read_bytes()
    refusing(60)
    with pytest.raises(OSError, match="the store refuses these credentials, or there are none; give them in the environment"):
        (folder / "a").write_bytes(b"x")
    with pytest.raises(OSError, match="the store refuses these credentials"):
        (folder / "a").read_bytes()
    check = check_store(folder)
    assert (check.level, "the store refuses these credentials" in check.text) == ("problem", True)


def test_a_write_is_tried_again_once(folder: StorePath, refusing: Callable[[float], None]) -> None:
    write_json(folder / "a.json", {"a": 1})
    refusing(0.25)
    persist(folder / "a.json", lambda: write_json(folder / "a.json", {"a": 2}))
    refusing(60)
    with pytest.raises(OSError, match=r"x/a.json\?endpoint_override=.*: cannot be written, twice 0.5 s apart"):
        persist(folder / "a.json", lambda: write_json(folder / "a.json", {"a": 3}))
    refusing(0)
    time.sleep(0.2)
    assert json.loads((folder / "a.json").read_text()) == {"a": 2}
    assert check_store(folder).level == "ok"
    assert [path.name for path in folder.iterdir()] == ["a.json"]


# ---- the lease ----

HOLD = """
import sys, time
from raysearch.study import lease
from raysearch.study.storage import location
lease.RENEW_S = 0.2
with lease.lease(location(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: StorePath) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n", process.communicate()
    return process


def test_a_second_driver_is_refused_until_the_first_is_gone(folder: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(folder)
    first = hold(folder / "lock")
    assert ledger.driver() == (True, f"process {first.pid} on {os.uname().nodename}")
    with pytest.raises(ValueError, match=rf"another driver runs this study \(process {first.pid} on .*, last seen \d+ s ago\)"):
        ledger.lock().__enter__()
    first.communicate()
    assert ledger.driver() == (False, "")
    second = hold(folder / "lock")
    second.kill()
    second.communicate()
    assert ledger.driver() == (False, f"process {second.pid} on {os.uname().nodename}")
    with ledger.lock():  # its process is known to be dead, so nobody waits for STALE_S
        assert ledger.driver() == (True, f"process {os.getpid()} on {os.uname().nodename}")
    assert not (folder / "lock").exists()


def test_a_lease_of_another_machine_is_given_up_when_it_is_old(folder: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "lock"
    path.write_bytes(json.dumps({"process": 7, "host": "elsewhere", "process_table": "other", "began_at_s": 0.0}).encode())
    assert holder(path)[:2] == (True, "process 7 on elsewhere")
    with pytest.raises(ValueError, match="process 7 on elsewhere, last seen"), lease.lease(path):
        pass
    path.write_bytes(b"process 7 on a local study's lock")
    assert holder(path) == (False, "", 0.0)
    path.write_bytes(json.dumps({"process": 7, "host": "elsewhere", "process_table": "other", "began_at_s": 0.0}).encode())
    monkeypatch.setattr(lease, "STALE_S", -1.0)
    assert holder(path)[:2] == (False, "process 7 on elsewhere")
    with lease.lease(path):
        pass
    assert not path.exists()


def test_whoever_loses_the_lease_ends(folder: StorePath) -> None:
    first = hold(folder / "lock")
    (folder / "lock").write_bytes(json.dumps({"process": 7, "host": "elsewhere", "process_table": "other"}).encode())
    assert first.wait(timeout=20) == -signal.SIGTERM
    assert "process 7 on elsewhere took this study over" in first.communicate()[1]
    assert json.loads((folder / "lock").read_text())["host"] == "elsewhere"


def test_of_two_that_start_at_once_one_goes_on(folder: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "lock"
    other = json.dumps({"process": 7, "host": "elsewhere", "process_table": "other"}).encode()
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: path.write_bytes(other))  # between our write and our second look
    with pytest.raises(ValueError, match="process 7 on elsewhere"), lease.lease(path):
        pass
    assert path.read_bytes() == other


# ---- rounds ----


def truncate(path: StorePath) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [truncate, StorePath.unlink])
def test_damaged_weights_are_computed_again(worker: Worker, folder: StorePath, damage: Callable[[StorePath], None]) -> None:
    shared = worker.ledger
    worker.ledger, worker.loaded_key = Ledger(folder), None
    try:
        first = run_round(worker, dense_round(worker), ACTION)
        path = worker.ledger.weights_path(first.key)
        with as_file(path) as file:
            before = read_weights(file, first.weights_sha256)
        damage(path)
        worker.engine.load_base()
        worker.loaded_key = None
        second = run_round(worker, first, ACTION.model_copy(update={"sparsity": 0.7, "data_start_tokens": 1024}))
        with as_file(path) as file:
            after = read_weights(file, worker.ledger.candidate(first.key).weights_sha256)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert path.with_suffix(".damaged").exists() == (damage is truncate)
        assert set(worker.ledger.rounds()) == {worker.inputs.root_key, first.key, second.key}
        assert worker.ledger.delete_weights([first.key])[0] == 1 + (damage is truncate)
        assert worker.ledger.round(first.key) is not None
    finally:
        worker.ledger, worker.loaded_key = shared, None


def test_a_round_exists_once_its_record_does(worker: Worker, folder: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = worker.ledger
    worker.ledger, worker.loaded_key = Ledger(folder), None
    uploaded: list[str] = []
    upload = StorePath.upload
    monkeypatch.setattr(StorePath, "upload", lambda path, local: (uploaded.append(path.name), upload(path, local)))
    try:
        record = run_round(worker, dense_round(worker), ACTION)
        assert uploaded == ["record.json", "weights.safetensors", "record.json"]
        assert worker.ledger.round(record.key) == record
    finally:
        worker.ledger, worker.loaded_key = shared, None


# ---- commands ----


def command(*arguments: str) -> str:
    """What a command prints that runs in this process."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def states(folder: StorePath) -> list[TrialState]:
    """Of the trials in Optuna's journal."""
    with as_file(folder / "journal.log") as file:
        study = optuna.load_study(study_name="raysearch", storage=JournalStorage(JournalFileBackend(str(file))))
        assert [trial.number for trial in study.trials] == list(range(len(study.trials)))
        return [trial.state for trial in study.trials]


def check(folder: StorePath, *statuses: str) -> Ledger:
    """What must hold of a finished study, however it came to be finished."""
    ledger = Ledger.open(str(folder))
    trials = ledger.trials()
    assert tuple(trial.status for trial in trials) == statuses, [trial.reason for trial in trials]
    assert {key for trial in trials for key in trial.keys} | {ledger.study().root_key} == set(ledger.rounds())
    assert states(folder) == [TrialState.FAIL if trial.traceback else TrialState.COMPLETE for trial in trials]
    assert set(ledger.reports()) >= {ledger.study().root_key}
    assert ledger.driver() == (False, "")
    return ledger


def written(folder: StorePath) -> dict[str, float]:
    """When each record of a round was."""
    return {str(path): path.stat().st_mtime for path in (folder / "rounds").glob("*/record.json")}


def test_a_sweep_and_all_that_reads_it(folder: StorePath, tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    uri = str(folder)
    write_space(tmp_path, tiny_model, stories, num_trials=2)
    code, out, err = finish(sweep(tmp_path, "--out", uri, "--keep", "none"))
    assert code == 0, out + err
    assert "2 candidates of 2 trials (1 failed) in" in out
    assert uri in out
    ledger = check(folder, "done", "failed")
    assert not list((folder / "rounds").glob("*/weights*"))
    assert not (tmp_path / "study").exists()
    assert location(ledger.trial(0).log_path).is_file()
    everything = [path for pattern in ("*", "*/*", "*/*/*", "*/*/*/*") for path in folder.glob(pattern)]
    assert {"result.json", "study.json", "journal.log"} <= {path.name for path in everything}
    assert not [str(path) for path in everything if SECRET.encode() in path.read_bytes()]
    assert SECRET not in out + err

    assert "trials      1 done, 1 failed, of 2" in command("status", uri)
    assert command("results", uri, "--format", "csv").count("\n") == 5
    assert command("report", uri).strip() == str(folder / "report.html")
    assert "report.html" in str(folder / "report.html")
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    picked = command("pick", uri, "--max-drop", "text/bits_per_byte=100")
    assert str(folder / "pick.json") in picked
    told = command("export", str(folder / "pick.json"), "--out", str(tmp_path / "deploy"))
    assert "computing them again" in told
    assert raysearch.load(tmp_path / "deploy").num_parameters() == ledger.candidate(ledger.trial(0).keys[0]).num_parameters
    assert "ok       s3://" in CliRunner().invoke(app, ["doctor", uri]).output
    code = ("import sys; from analysis.load import load; load(sys.argv[1])\n"
            "print([m for m in ('torch', 'ray', 'optuna') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_commands_that_take_no_uri(folder: StorePath, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="only a study's directory can be a URI"):
        command("pretrain", "--out", str(folder))
    with pytest.raises(ValueError, match="only a study's directory can be a URI"):
        export(Ledger(folder), "k", Path(str(folder)))
    with pytest.raises(ValueError, match="only a study's directory can be a URI"):
        command("prune", str(tiny_model), "--sparsity", "0.5", "--out", str(folder))


@pytest.mark.slow
def test_a_finished_study_is_found_finished_and_extended(folder: StorePath, tmp_path: Path, tiny_model: Path,
                                                         stories: Path) -> None:
    uri = str(folder)
    write_space(tmp_path, tiny_model, stories, num_trials=2)
    code, out, err = finish(sweep(tmp_path, "--out", uri))
    assert code == 0, out + err
    before = written(folder)
    code, out, err = finish(sweep(tmp_path, "--out", uri))
    assert code == 0, out + err
    assert "resuming" in out
    assert " s] " not in out  # nothing ran

    # killed between its change and the upload: the end of a trial is not in the store
    lines = (folder / "journal.log").read_bytes().splitlines(keepends=True)
    ends = JournalOperation.SET_TRIAL_STATE_VALUES
    last = max(index for index, line in enumerate(lines) if json.loads(line)["op_code"] == ends)
    (folder / "journal.log").write_bytes(b"".join(lines[:last]))
    assert TrialState.RUNNING in states(folder)
    code, out, err = finish(sweep(tmp_path, "--out", uri, "--trials", "3"))
    assert code == 0, out + err
    check(folder, "done", "failed", "done")
    assert before.items() <= written(folder).items()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_driver_that_ends_early_and_the_next(folder: StorePath, tmp_path: Path, tiny_model: Path, stories: Path,
                                               number: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(tmp_path, SLOW_ROUNDS, monkeypatch)
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=1)
    process = sweep(tmp_path, "--out", str(folder))
    wait_until(lambda: len(written(folder)) >= 2, process)
    with pytest.raises(ValueError, match=rf"another driver runs this study \(process {process.pid} on .*, last seen \d+ s ago"):
        Ledger(folder).lock().__enter__()
    process.send_signal(number)
    told = time.monotonic()
    assert process.wait(timeout=20) == code
    assert time.monotonic() - told < 3
    process.communicate()
    assert Ledger(str(folder)).driver() == (False, f"process {process.pid} on {os.uname().nodename}" if code == -9 else "")
    before = written(folder)
    done, out, err = finish(sweep(tmp_path, "--out", str(folder)))
    assert done == 0, out + err
    check(folder, "done", "failed", "done")
    assert before.items() <= written(folder).items()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_that_hangs_fails_its_trial_with_its_stack(folder: StorePath, tmp_path: Path, tiny_model: Path, stories: Path,
                                                          num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(tmp_path, HANG, monkeypatch)
    write_space(tmp_path, tiny_model, stories, num_trials=2, max_concurrent=1, num_ranks=num_ranks, round_limit_s=8.0)
    code, out, err = finish(sweep(tmp_path, "--out", str(folder)))
    assert code == 0, out + err
    failed = check(folder, "done", "failed").trial(1)
    assert "took longer than round_limit_s = 8 s" in failed.reason
    assert f"rank {num_ranks - 1} in wait_for_godot (<string>:5), called by stuck" in failed.reason
    assert (folder / "trials" / f"00000.rank-{num_ranks - 1}.log").is_file()


@pytest.mark.slow
def test_doctor_asks_every_node(folder: StorePath) -> None:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        (check,) = check_storage(folder)
    finally:
        ray.shutdown()
    assert (check.level, check.text) == ("ok", f"{folder} is seen by all of the cluster's 1 nodes, 0 GPU, 1 CPU")
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_killed_node_of_a_gang_over_two_nodes(folder: StorePath, tmp_path: Path, tiny_model: Path, stories: Path,
                                                cluster: Cluster) -> None:  # noqa: F811
    write_space(tmp_path, tiny_model, stories, num_trials=2, max_concurrent=1, num_ranks=2, zero_stage=2, cpus_per_rank=1.0)
    process = sweep(tmp_path, "--out", str(folder), address=cluster.address)
    wait_until(lambda: len(written(folder)) >= 2, process)
    before = written(folder)
    (node,) = homes(cluster, "ray::Rank").values()
    cluster.remove_node(node, allow_graceful=False)
    code, out, err = finish(process)
    assert code == 0, out + err
    check(folder, "done", "failed")
    assert before.items() <= written(folder).items()
    assert {path.name for path in (folder / "trials").glob("00000.*")} == {
        "00000.json", "00000.rank-0.log", "00000.rank-1.log"}
