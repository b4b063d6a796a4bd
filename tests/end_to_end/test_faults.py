"""Faults, injected for real: no finished round is lost, none is recorded twice, no trial stays running, others go on.

The quick ones run by default; `make chaos` runs the slow ones too. Others of their kind: a torn journal and a driver's kill
in test_search.py, signals in test_signals.py, a job's stop in test_jobs.py, locks in test_ledger.py and test_status.py.
"""

import resource
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import psutil
import pytest
import torch
from faults import inject, kill, wait_until, workers
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sweeps import finish, sweep, write_space

import raysearch.study.files
from raysearch.config import Action, Study, TrialConfig
from raysearch.models.weights import read_weights
from raysearch.study.files import persist, write_json
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import utc_now
from raysearch.study.records import TrialRecord
from raysearch.trial.actions import resolve_actions
from raysearch.trial.round import dense_round, load_candidate, run_round
from raysearch.trial.run import run_trial
from raysearch.trial.worker import Worker

ACTION = Action(sparsity=0.5, finetune_tokens=1024, learning_rate=1e-3)


# ---- damaged checkpoints ----


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


@pytest.fixture
def apart(worker: Worker, tmp_path: Path) -> Worker:
    """The shared workbench on a study directory of its own."""
    ledger = worker.ledger
    worker.ledger, worker.loaded_key = Ledger(tmp_path / "study"), None
    yield worker
    worker.ledger, worker.loaded_key = ledger, None


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_damaged_weights_are_computed_again(apart: Worker, damage: Callable[[Path], None]) -> None:
    first = run_round(apart, dense_round(apart), ACTION)
    second = run_round(apart, first, ACTION.model_copy(update={"sparsity": 0.7, "data_start_tokens": 1024}))
    path = apart.ledger.weights_path(second.key)
    before = {name: tensor.clone() for name, tensor in read_weights(path, second.weights_sha256).items()}  # not mapped
    for record in (first, second):  # its parent's too, so that both are computed again
        damage(apart.ledger.weights_path(record.key))
    apart.engine.load_base()
    apart.loaded_key = None
    third = run_round(apart, second, ACTION.model_copy(update={"sparsity": 0.8, "data_start_tokens": 2048}))
    again = apart.ledger.candidate(second.key)
    assert again.model_copy(update={"weights_sha256": second.weights_sha256}) == second
    after = read_weights(path, again.weights_sha256)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {record.key for record in apart.ledger.rounds().values()} == {
        apart.inputs.root_key, first.key, second.key, third.key}
    assert third.sparsity == pytest.approx(0.8, abs=1e-4)
    assert path.with_suffix(".damaged").exists() == (damage is not Path.unlink)
    load_candidate(apart, again)
    assert sum(apart.engine.nonzero_counts().values()) == second.num_nonzero


# ---- storage that refuses ----


@contextmanager
def refusing(seconds: float = threading.TIMEOUT_MAX) -> Iterator[None]:
    """For `seconds`, but no longer than the block, the system refuses every file of this process above 20 kB (EFBIG).

    A block, not a fixture: pytest's own output can be such a file, and it writes there before it tears fixtures down.
    """
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    timer = threading.Timer(seconds, resource.setrlimit, (resource.RLIMIT_FSIZE, old))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused write is tried again after half a second."""
    monkeypatch.setattr(raysearch.study.files, "WRITE_RETRY_S", 0.5)


@pytest.mark.usefixtures("soon")
def test_storage_that_refuses_once_costs_a_moment(apart: Worker) -> None:
    dense = dense_round(apart)
    started = time.monotonic()
    with refusing(seconds=0.25):
        persist(apart.ledger.directory / "x", lambda: (apart.ledger.directory / "x").write_bytes(b"0" * 30_000))
    assert 0.5 <= time.monotonic() - started < 5
    record = run_round(apart, dense, ACTION)
    assert apart.ledger.candidate(record.key) == record


@pytest.mark.usefixtures("soon")
def test_storage_that_always_refuses_fails_the_trial_with_the_path(apart: Worker, study: Study) -> None:
    config = TrialConfig(target_sparsity=0.5, num_rounds=1, schedule="linear")
    trial = TrialRecord(number=0, config=config, started_at=utc_now(),
                        actions=resolve_actions(config, study, apart.inputs.num_train_tokens))
    dense_round(apart)
    with refusing(), pytest.raises(OSError, match=r"weights.safetensors|rounds/"):
        list(run_trial(apart, trial))
    failed = apart.ledger.trial(0)
    assert failed.status == "failed"
    assert str(apart.ledger.directory / "rounds") in failed.reason
    assert "cannot be written, twice 0.5 s apart" in failed.reason
    assert list(apart.ledger.rounds()) == [apart.inputs.root_key]
    assert not [path for path in (apart.ledger.directory / "rounds").iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("soon")
def test_a_refused_record_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with refusing(), pytest.raises(OSError, match="a.json: cannot be written"):
        persist(path, lambda: write_json(path, {"a": "1" * 30_000}))
    assert path.read_text() == '{\n "a": 1\n}'
    assert list(tmp_path.iterdir()) == [path]


# ---- processes that die or hang ----


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
write_weights = candidate.write_weights
def dying(path, weights):
    sha256 = write_weights(path, weights)
    if not os.path.exists(os.environ["FAULT"] + ".done"):
        open(os.environ["FAULT"] + ".done", "w").close()
        os.truncate(path, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    return sha256
candidate.write_weights = dying
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
    assert failed.reason.endswith("lower batch_tokens, or shard it over more ranks with num_ranks and zero_stage")


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
    assert shutil.rmtree(tmp_path / "study") is None
