"""Whole sweeps on a real S3 server (moto's, in this process), and the commands that read them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from faults import inject, wait_until
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState
from s3 import SECRET
from sweeps import finish, sweep, write_space
from test_faults import HANG, SLOW_ROUNDS
from test_nodes import Cluster, cluster, homes  # noqa: F401
from typer.testing import CliRunner

import raysearch
from raysearch.cli import app
from raysearch.deploy.export import export
from raysearch.study.ledger import Ledger
from raysearch.study.storage import StorePath, as_file, location


def command(*arguments: str) -> str:
    """What a command prints that runs in this process."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def states(store: StorePath) -> list[TrialState]:
    """Of the trials in Optuna's journal."""
    with as_file(store / "journal.log") as file:
        study = optuna.load_study(study_name="raysearch", storage=JournalStorage(JournalFileBackend(str(file))))
        assert [trial.number for trial in study.trials] == list(range(len(study.trials)))
        return [trial.state for trial in study.trials]


def check(store: StorePath, *statuses: str) -> Ledger:
    """What must hold of a finished study, however it came to be finished."""
    ledger = Ledger.open(str(store))
    trials = ledger.trials()
    assert tuple(trial.status for trial in trials) == statuses, [trial.reason for trial in trials]
    assert {key for trial in trials for key in trial.keys} | {ledger.study().root_key} == set(ledger.rounds())
    assert states(store) == [TrialState.FAIL if trial.traceback else TrialState.COMPLETE for trial in trials]
    assert set(ledger.report_records()) >= {ledger.study().root_key}
    assert ledger.driver() == (False, "")
    return ledger


def written(store: StorePath) -> dict[str, float]:
    """When each record of a round was."""
    return {str(path): path.stat().st_mtime for path in (store / "rounds").glob("*/record.json")}


def test_a_sweep_and_all_that_reads_it(store: StorePath, tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    uri = str(store)
    write_space(tmp_path, tiny_model, stories, num_trials=2)
    code, out, err = finish(sweep(tmp_path, "--out", uri, "--keep", "none"))
    assert code == 0, out + err
    assert "2 candidates of 2 trials (1 failed) in" in out
    assert uri in out
    ledger = check(store, "done", "failed")
    assert not list((store / "rounds").glob("*/weights*"))
    assert not (tmp_path / "study").exists()
    assert location(ledger.trial(0).log_path).is_file()
    everything = [path for pattern in ("*", "*/*", "*/*/*", "*/*/*/*") for path in store.glob(pattern)]
    assert {"study.json", "journal.log"} <= {path.name for path in everything}
    assert len([path for path in everything if path.name.startswith("events.out.tfevents")]) == 3  # dense, and two trials
    assert not [str(path) for path in everything if SECRET.encode() in path.read_bytes()]
    assert SECRET not in out + err

    assert "trials      1 done, 1 failed, of 2" in command("status", uri)
    assert command("results", uri, "--format", "csv").count("\n") == 5
    assert command("report", uri).strip() == str(store / "report.html")
    assert "report.html" in str(store / "report.html")
    assert (store / "report.html").read_text().startswith("<!doctype html>")
    picked = command("pick", uri, "--max-drop", "text/bits_per_byte=100")
    assert str(store / "pick.json") in picked
    told = command("export", str(store / "pick.json"), "--out", str(tmp_path / "deploy"))
    assert "computing them again" in told
    assert raysearch.load(tmp_path / "deploy").num_parameters() == ledger.candidate(ledger.trial(0).keys[0]).num_parameters
    assert "ok       s3://" in CliRunner().invoke(app, ["doctor", uri]).output
    code = ("import sys; from analysis.load import load; load(sys.argv[1])\n"
            "print([m for m in ('torch', 'ray', 'optuna') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_commands_that_take_no_uri(store: StorePath, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="only a study's directory can be a URI"):
        command("pretrain", "--out", str(store))
    with pytest.raises(ValueError, match="only a study's directory can be a URI"):
        export(Ledger(store), "k", Path(str(store)))
    with pytest.raises(ValueError, match="only a study's directory can be a URI"):
        command("prune", str(tiny_model), "--sparsity", "0.5", "--out", str(store))


@pytest.mark.slow
def test_a_finished_study_is_found_finished_and_extended(store: StorePath, tmp_path: Path, tiny_model: Path,
                                                         stories: Path) -> None:
    uri = str(store)
    write_space(tmp_path, tiny_model, stories, num_trials=2)
    code, out, err = finish(sweep(tmp_path, "--out", uri))
    assert code == 0, out + err
    before = written(store)
    code, out, err = finish(sweep(tmp_path, "--out", uri))
    assert code == 0, out + err
    assert "resuming" in out
    lines = [line for line in out.splitlines() if "still at the sweep" not in line]  # which a slow machine says
    assert " s] " not in "\n".join(lines)  # nothing ran

    # killed between its change and the upload: the end of a trial is not in the store
    lines = (store / "journal.log").read_bytes().splitlines(keepends=True)
    ends = JournalOperation.SET_TRIAL_STATE_VALUES
    last = max(index for index, line in enumerate(lines) if json.loads(line)["op_code"] == ends)
    (store / "journal.log").write_bytes(b"".join(lines[:last]))
    assert TrialState.RUNNING in states(store)
    code, out, err = finish(sweep(tmp_path, "--out", uri, "--trials", "3"))
    assert code == 0, out + err
    check(store, "done", "failed", "done")
    assert before.items() <= written(store).items()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_driver_that_ends_early_and_the_next(store: StorePath, tmp_path: Path, tiny_model: Path, stories: Path,
                                               number: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(tmp_path, SLOW_ROUNDS, monkeypatch)
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=1)
    process = sweep(tmp_path, "--out", str(store))
    wait_until(lambda: len(written(store)) >= 2, process)
    with pytest.raises(ValueError, match=rf"another driver runs this study \(process {process.pid} on .*, last seen \d+ s ago"):
        Ledger(store).lock().__enter__()
    process.send_signal(number)
    told = time.monotonic()
    assert process.wait(timeout=20) == code
    assert time.monotonic() - told < 3
    process.communicate()
    assert Ledger(str(store)).driver() == (False, f"process {process.pid} on {os.uname().nodename}" if code == -9 else "")
    before = written(store)
    done, out, err = finish(sweep(tmp_path, "--out", str(store)))
    assert done == 0, out + err
    check(store, "done", "failed", "done")
    assert before.items() <= written(store).items()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_that_hangs_fails_its_trial_with_its_stack(store: StorePath, tmp_path: Path, tiny_model: Path, stories: Path,
                                                          num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(tmp_path, HANG, monkeypatch)
    write_space(tmp_path, tiny_model, stories, num_trials=2, max_concurrent=1, num_ranks=num_ranks, round_limit_s=8.0)
    code, out, err = finish(sweep(tmp_path, "--out", str(store)))
    assert code == 0, out + err
    failed = check(store, "done", "failed").trial(1)
    assert "took longer than round_limit_s = 8 s" in failed.reason
    assert f"rank {num_ranks - 1} in wait_for_godot (<string>:5), called by stuck" in failed.reason
    assert (store / "trials" / f"00000.rank-{num_ranks - 1}.log").is_file()


@pytest.mark.slow
def test_a_store_that_refuses_in_the_middle_is_one_sentence(store: StorePath, tmp_path: Path, tiny_model: Path, stories: Path,
                                                            refused_writes: list[str]) -> None:
    write_space(tmp_path, tiny_model, stories, num_trials=2, max_concurrent=1)
    process = sweep(tmp_path, "--out", str(store))
    wait_until(lambda: len(written(store)) >= 2, process)
    refused_writes += ["PUT", "POST", "DELETE"]
    code, out, err = finish(process)
    assert (code, err.count("\n")) == (2, 1), err
    assert re.match("raysearch: s3://bucket/.*: cannot be written, twice 3 s apart .the store refuses to write here; give "
                    "these credentials the right to put .*; free or mend the storage, and the same sweep goes on", err)
    refused_writes.clear()
    code, out, err = finish(sweep(tmp_path, "--out", str(store)))
    assert code == 0, out + err
    check(store, "done", "failed")


@pytest.mark.slow
def test_a_killed_node_of_a_gang_over_two_nodes(store: StorePath, tmp_path: Path, tiny_model: Path, stories: Path,
                                                cluster: Cluster) -> None:  # noqa: F811
    write_space(tmp_path, tiny_model, stories, num_trials=2, max_concurrent=1, num_ranks=2, zero_stage=2, cpus_per_rank=1.0)
    process = sweep(tmp_path, "--out", str(store), address=cluster.address)
    wait_until(lambda: len(written(store)) >= 2, process)
    before = written(store)
    (node,) = homes(cluster, "ray::Rank").values()
    cluster.remove_node(node, allow_graceful=False)
    code, out, err = finish(process)
    assert code == 0, out + err
    check(store, "done", "failed")
    assert before.items() <= written(store).items()
    assert {path.name for path in (store / "trials").glob("00000.*")} == {
        "00000.json", "00000.rank-0.log", "00000.rank-1.log"}
