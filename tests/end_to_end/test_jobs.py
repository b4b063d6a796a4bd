"""A real `ray job` on a real head with a token, in a home and a temporary folder of its own."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sweeps import write_space

from raysearch.study.ledger import Ledger
from raysearch.training.hardware import free_port

RAY = str(Path(sys.executable).with_name("ray"))
ROOT = Path(__file__).parent.parent.parent


class Head:
    """A running head node; `submit` gives its dashboard a job and returns the command's process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dashboard_port = free_port()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {"HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0",
                             "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                             "PYTHONPATH": str(ROOT), "RAYSEARCH_CACHE": str(folder / "cache")}

    def start(self) -> subprocess.Popen:
        subprocess.run([RAY, "get-auth-token", "--generate"], env=self.environment, capture_output=True, check=True)
        return subprocess.Popen(
            [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={free_port()}",
             f"--dashboard-port={self.dashboard_port}", "--dashboard-host=127.0.0.1", "--num-cpus=2",
             f"--dashboard-agent-listen-port={free_port()}",  # by default one that the last Ray here may hold yet
             f"--temp-dir={self.folder / 'ray'}", "--disable-usage-stats"],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def submit(self, working_dir: Path, *command: str, name: str | None = None) -> subprocess.Popen:
        options = [f"--submission-id={name}"] if name else []
        return subprocess.Popen(
            [RAY, "job", "submit", "--address", self.address, "--working-dir", str(working_dir), *options,
             "--log-style=record", "--", *command],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def stop(self, name: str) -> None:
        """What `ray job stop` asks for, without the seconds that its start takes."""
        token = (self.folder / ".ray" / "auth_token").read_text().strip()
        urllib.request.urlopen(urllib.request.Request(
            f"{self.address}/api/jobs/{name}/stop", method="POST", headers={"Authorization": f"Bearer {token}"}),
            timeout=30).close()

    def run(self, working_dir: Path, *command: str) -> tuple[int, str]:
        process = self.submit(working_dir, *command)
        out, _ = process.communicate(timeout=240)
        return process.returncode, out


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="rs"))  # short: Ray's sockets lie in it, with paths below 108 bytes
    head = Head(folder)
    process = head.start()
    try:
        deadline = time.monotonic() + 120
        work = folder / "work"
        work.mkdir()
        (work / "file").write_text("Ray refuses an empty folder")
        while head.run(work, "true")[0]:  # the dashboard answers before it can start jobs
            assert process.poll() is None
            assert time.monotonic() < deadline, head.run(work, "true")[1]
            time.sleep(1)
        yield head
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_as_a_job(head: Head, tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    work, study = tmp_path / "work", tmp_path / "study"
    work.mkdir()
    write_space(work, tiny_model, stories, num_trials=2)
    code, out = head.run(work, "python", "-m", "raysearch", "sweep", "space", "--out", str(study))
    assert code == 0, out
    lines = [line for line in out.splitlines() if line.startswith("[") and " s] " in line]
    assert lines
    assert any("trial 0 round" in line for line in lines)
    assert not [line for line in lines if "\x1b" in line or "\r" in line]
    ledger = Ledger.open(study)
    assert [trial.status for trial in ledger.trials()] == ["done", "failed"]
    assert f"{len(ledger.rounds()) - 1} candidates of 2 trials (1 failed)" in out

    code, out = head.run(work, "python", "-m", "raysearch", "sweep", "space", "--out", str(study))  # attaches
    assert code == 0, out
    assert "resuming" in out

    (work / "space.py").write_text("STUDY = {'model': {'path': 'nowhere'}}\ndef space(trial): return {}\n")
    code, out = head.run(work, "python", "-m", "raysearch", "sweep", "space", "--out", str(tmp_path / "other"))
    assert code == 1  # the job's, whatever the command's own was
    assert "raysearch: model nowhere: no such folder" in out
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_job_leaves_a_study_that_others_can_read_and_resume(head: Head, tmp_path: Path, tiny_model: Path,
                                                                      stories: Path) -> None:
    work, study = tmp_path / "work", tmp_path / "study"
    work.mkdir()
    write_space(work, tiny_model, stories, num_trials=4, max_concurrent=1)
    command = ("python", "-m", "raysearch", "sweep", "space", "--out", str(study))
    process = head.submit(work, *command, name="to-stop")
    deadline = time.monotonic() + 200
    while not list(study.glob("rounds/[!.]*/weights.safetensors")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)

    # what optuna-dashboard does: another process opens the journal of the running study, and only reads
    before = (study / "journal.log").read_bytes()
    opened = optuna.load_study(study_name="raysearch", storage=JournalStorage(JournalFileBackend(
        str(study / "journal.log"))))
    assert opened.metric_names == ["num_nonzero", "text/bits_per_byte"]
    assert optuna.trial.TrialState.RUNNING in [trial.state for trial in opened.trials]
    assert (study / "journal.log").read_bytes().startswith(before)

    head.stop("to-stop")
    out, _ = process.communicate(timeout=60)
    assert "the same command goes on from the last finished round" in out
    assert (study / "lock").read_text() == ""  # it ended by itself, before the kill
    assert "running" in [trial.status for trial in Ledger.open(study).trials()]
    finished = {path: path.stat().st_mtime_ns for path in study.glob("rounds/[!.]*/record.json")}

    code, out = head.run(work, *command)
    assert code == 0, out
    assert [trial.status for trial in Ledger.open(study).trials()] == ["done", "failed", "done", "done"]
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_doctor_as_a_job_asks_every_node(head: Head, tmp_path: Path) -> None:
    _, out = head.run(ROOT / "search_spaces", "python", "-m", "raysearch", "doctor", str(tmp_path))
    assert f"the dashboard at 127.0.0.1:{head.dashboard_port} is on loopback and asks for a token" in out
    assert f"{tmp_path} is seen by all of the cluster's 1 nodes, 0 GPU, 2 CPU" in out
    assert not list(tmp_path.iterdir())
