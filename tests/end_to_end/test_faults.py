"""Faults, injected for real: no finished round is lost, none is recorded twice, no trial stays running, others go on.

The quick ones run by default; `make chaos` runs the slow ones too. Others of their kind: damaged weights and storage that
refuses in test_candidate.py and test_files.py, a torn journal in test_journal.py, a driver's kill in test_sweep.py, signals in
test_signals.py, a job's stop in test_jobs.py, locks in test_ledger.py, test_lease.py and test_status.py.
"""

from collections import Counter
from pathlib import Path

import optuna
import psutil
import pytest
from faults import inject, kill, wait_until, workers
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sweeps import finish, sweep, write_space

from raysearch.models.weights import read_weights
from raysearch.study.ledger import Ledger


def check(folder: Path, num_trials: int, failed: dict[int, str]) -> Ledger:
    """The invariants; `failed` are the trials that must have failed, each with a part of its reason."""
    ledger = Ledger.open(folder / "study")
    trials = ledger.trials()
    assert [trial.number for trial in trials] == list(range(num_trials))
    assert Counter(t.status for t in trials) == Counter(done=num_trials - len(failed), failed=len(failed)), [
        (t.number, t.status, t.reason) for t in trials]
    for number, reason in failed.items():
        assert reason in trials[number].reason
    assert all(len(set(trial.keys)) == len(trial.actions) for trial in trials if trial.status == "done")
    assert {key for trial in trials for key in trial.keys} | {ledger.study().root_key} == set(ledger.rounds())
    study = optuna.load_study(study_name="raysearch", storage=JournalStorage(
        JournalFileBackend(str(ledger.directory / "journal.log"))))
    assert [trial.number for trial in study.trials] == list(range(num_trials))
    assert optuna.trial.TrialState.RUNNING not in [trial.state for trial in study.trials]
    assert not list(ledger.directory.glob("rounds/.*"))
    return ledger


def records(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "study" / "rounds").glob("[!.]*/record.json")}


SLOW_ROUNDS = """
import time
train = round.train_candidate
def slow(worker, parent, action):
    time.sleep(1.5)
    return train(worker, parent, action)
round.train_candidate = slow
"""


@pytest.mark.slow
def test_a_killed_rank_costs_a_round(tmp_path: Path, tiny_model: Path, stories: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    inject(tmp_path, SLOW_ROUNDS, monkeypatch)
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=2)
    process = sweep(tmp_path)
    wait_until(lambda: len(records(tmp_path)) >= 2, process)
    before = records(tmp_path)
    kill(workers(process.pid, "ray::ResourceTrainable")[0])
    code, out, err = finish(process)
    assert code == 0, out + err
    check(tmp_path, 3, {1: "training loss became"})
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["ray::ResourceTrainable", "ray::Rank"])
def test_a_killed_rank_of_a_gang_of_two(tmp_path: Path, tiny_model: Path, stories: Path, victim: str,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    inject(tmp_path, SLOW_ROUNDS, monkeypatch)
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=1, num_ranks=2, zero_stage=3)
    process = sweep(tmp_path)
    wait_until(lambda: len(records(tmp_path)) >= 2, process)
    before = records(tmp_path)
    kill(workers(process.pid, victim)[0])
    code, out, err = finish(process)
    assert code == 0, out + err
    check(tmp_path, 3, {1: "training loss became"})
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


DIES_WRITING = """
import os, signal
from raysearch.trial import candidate
write = candidate.WeightsFile.write
def dying(file, name, stored):
    write(file, name, stored)
    if not os.path.exists(os.environ["FAULT"] + ".done"):
        open(os.environ["FAULT"] + ".done", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
candidate.WeightsFile.write = dying
"""


@pytest.mark.slow
def test_a_rank_killed_while_it_writes_a_round(tmp_path: Path, tiny_model: Path, stories: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    inject(tmp_path, DIES_WRITING, monkeypatch)
    write_space(tmp_path, tiny_model, stories, num_trials=2, max_concurrent=1)
    code, out, err = finish(sweep(tmp_path))
    assert code == 0, out + err
    assert (tmp_path / "fault.py.done").exists()
    ledger = check(tmp_path, 2, {1: "training loss became"})
    for key in ledger.trial(0).keys:
        read_weights(ledger.weights_path(key), ledger.candidate(key).weights_sha256)


HANG = """
import time
train = round.train_candidate
def wait_for_godot():
    time.sleep(3600)
def stuck(worker, parent, action):
    if worker.engine.rank == worker.engine.world_size - 1 and action.sparsity == 0.25:  # only trial 1's
        wait_for_godot()
    return train(worker, parent, action)
round.train_candidate = stuck
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_that_hangs_fails_its_trial_with_its_stack(tmp_path: Path, tiny_model: Path, stories: Path, num_ranks: int,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    inject(tmp_path, HANG, monkeypatch)
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=1, num_ranks=num_ranks, round_limit_s=8.0)
    code, out, err = finish(sweep(tmp_path))
    assert code == 0, out + err
    ledger = check(tmp_path, 3, {1: "took longer than round_limit_s = 8 s"})
    failed = ledger.trial(1)
    assert f"rank {num_ranks - 1} in wait_for_godot (<string>:5), called by stuck" in failed.reason
    assert "wait_for_godot" in failed.traceback


OUT_OF_MEMORY = """
import torch
train = round.train_candidate
def greedy(worker, parent, action):
    if action.sparsity == 0.25:
        torch.empty(1 << 50)  # a petabyte: the allocator refuses for real
    return train(worker, parent, action)
round.train_candidate = greedy
"""


@pytest.mark.slow
def test_a_trial_out_of_memory_fails_with_advice(tmp_path: Path, tiny_model: Path, stories: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    inject(tmp_path, OUT_OF_MEMORY, monkeypatch)
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=1)
    code, out, err = finish(sweep(tmp_path))
    assert code == 0, out + err
    failed = check(tmp_path, 3, {1: "can't allocate memory"}).trial(1)
    assert failed.reason.endswith("shorten context_tokens, or shard it over more ranks with num_ranks and zero_stage")


HUNGRY = """
import time
train = round.train_candidate
def hungry(worker, parent, action):
    kept = []
    while action.sparsity == 0.25 and len(kept) < 160:
        kept.append(bytearray(b"x") * (64 << 20))
        time.sleep(0.02)
    return train(worker, parent, action)
round.train_candidate = hungry
"""


@pytest.mark.slow
def test_a_trial_that_eats_the_hosts_memory_fails_alone(tmp_path: Path, tiny_model: Path, stories: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own watch ends it, at 6 GB more than are in use now; the trial would take 10 GB."""
    memory = psutil.virtual_memory()
    if memory.available < 12e9:
        pytest.skip("needs 12 GB of free memory")
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{(memory.total - memory.available + 6e9) / memory.total:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "50")
    inject(tmp_path, HUNGRY, monkeypatch)
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=1)
    code, out, err = finish(sweep(tmp_path))
    assert code == 0, out + err
    check(tmp_path, 3, {1: "its process died twice, killed or out of memory"})


@pytest.mark.slow
def test_a_trial_whose_process_always_dies_fails_alone(tmp_path: Path, tiny_model: Path, stories: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    inject(tmp_path, OUT_OF_MEMORY.replace("torch.empty(1 << 50)", "import os; os._exit(9)"), monkeypatch)
    write_space(tmp_path, tiny_model, stories, num_trials=3)
    code, out, err = finish(sweep(tmp_path))
    assert code == 0, out + err
    check(tmp_path, 3, {1: "its process died twice"})


def test_two_drivers_on_one_study(tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    write_space(tmp_path, tiny_model, stories)
    with Ledger(tmp_path / "study").lock():
        code, _, err = finish(sweep(tmp_path))
    assert code == 2
    assert "another driver runs this study (process " in err
    assert not (tmp_path / "study").exists()  # which held nothing but the lock
