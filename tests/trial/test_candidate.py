"""A candidate as it is weighed, stored, damaged and computed again, in a folder and on a store."""

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import refusing
from transformers import GPT2Config, GPT2LMHeadModel

from raysearch.config import Action, Study, TrialConfig, study_of
from raysearch.deploy.export import export
from raysearch.kernels import SparseWeight
from raysearch.models.weights import read_sparse, read_weights
from raysearch.study.files import file_sha256, persist
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import provenance, utc_now
from raysearch.study.records import StudyRecord, TrialRecord
from raysearch.study.storage import StorePath, as_file
from raysearch.trial.actions import resolve_actions
from raysearch.trial.candidate import intact, weigh, written_meanwhile
from raysearch.trial.inputs import read_inputs, resolve
from raysearch.trial.round import dense_round, load_candidate, recover_weights, run_round
from raysearch.trial.run import run_trial
from raysearch.trial.worker import Worker

TOKENS = 64 * 16
ACTION = Action(sparsity=0.5, finetune_tokens=1024, learning_rate=1e-3)


def weights_of(worker: Worker) -> dict[str, torch.Tensor]:
    return {name: worker.engine.gather(name).clone() for name in worker.engine.shapes}


def test_counts_are_those_of_the_weights(worker: Worker) -> None:
    record = run_round(worker, dense_round(worker), Action(sparsity=0.3, finetune_tokens=TOKENS, learning_rate=1e-3))
    stored = read_weights(worker.ledger.round_directory(record.key) / "weights.safetensors", record.weights_sha256)
    prunable = [p.name for p in worker.engine.prunables]
    num_prunable = sum(stored[name].numel() for name in prunable)
    assert record.num_prunable == num_prunable
    assert record.num_nonzero == sum(int(w.count_nonzero()) for w in stored.values())
    zeros = sum(int((stored[name] == 0).sum()) for name in prunable)
    assert zeros == round(0.3 * num_prunable)
    assert record.sparsity == zeros / num_prunable
    assert record.resident_bytes == 4 * record.num_parameters
    assert record.stored_bytes < record.resident_bytes
    assert math.isfinite(record.train_loss)
    current = weights_of(worker)
    assert all(torch.equal(stored[name], current[name]) for name in stored)


def test_weights_are_copied_where_there_are_no_hard_links(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    record = run_round(worker, dense_round(worker), Action(sparsity=0.234))
    assert file_sha256(worker.ledger.weights_path(record.key)) == record.weights_sha256


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


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


def test_what_has_no_mask_is_stored_with_its_zeros(apart: Worker) -> None:
    weights = {name: apart.engine.gather(name).clone() for name in apart.engine.shapes}
    bias, matrix = "transformer.h.0.mlp.c_fc.bias", "transformer.h.0.mlp.c_fc.weight"
    weights[bias][:100] = 0
    weights[matrix][3] = 0
    apart.engine.load(weights)
    with written_meanwhile(apart, "key", weigh(apart, None)) as written:
        stored = read_sparse(written.result()[0], None)
        assert isinstance(stored[bias], torch.Tensor)
        assert isinstance(stored[matrix], SparseWeight)
        assert set(stored) == set(weights)
        back = read_weights(written.result()[0], None)
        assert all(torch.equal(back[name].view_as(weight), weight) for name, weight in weights.items())


@pytest.fixture
def on_store(apart: Worker, store: StorePath) -> Worker:
    """`apart`, with its study on a store."""
    apart.ledger = Ledger(store)
    return apart


def shorten(path: StorePath) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [shorten, StorePath.unlink])
def test_damaged_weights_on_a_store_are_computed_again(on_store: Worker, damage: Callable[[StorePath], None]) -> None:
    first = run_round(on_store, dense_round(on_store), ACTION)
    path = on_store.ledger.weights_path(first.key)
    with as_file(path) as file:
        before = read_weights(file, first.weights_sha256)
    damage(path)
    on_store.engine.load_base()
    on_store.loaded_key = None
    second = run_round(on_store, first, ACTION.model_copy(update={"sparsity": 0.7, "data_start_tokens": 1024}))
    with as_file(path) as file:
        after = read_weights(file, on_store.ledger.candidate(first.key).weights_sha256)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert path.with_suffix(".damaged").exists() == (damage is shorten)
    assert set(on_store.ledger.rounds()) == {on_store.inputs.root_key, first.key, second.key}
    assert on_store.ledger.delete_weights([first.key])[0] == 1 + (damage is shorten)
    assert on_store.ledger.round(first.key) is not None


def test_a_round_on_a_store_exists_once_its_record_does(on_store: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[str] = []
    upload = StorePath.upload
    monkeypatch.setattr(StorePath, "upload", lambda path, local: (uploaded.append(path.name), upload(path, local)))
    record = run_round(on_store, dense_round(on_store), ACTION)
    dense = on_store.inputs.root_key
    assert uploaded[:3] == ["items.selection.npz", "record.json", f"{dense}.record.json"]
    assert sorted(uploaded[3:-2]) == ["items.selection.npz", "weights.safetensors"]
    assert uploaded[-2:] == ["record.json", f"{record.key}.record.json"]
    assert set(on_store.ledger.items(record.key, "selection")) == set(record.metrics)
    assert on_store.ledger.round(record.key) == record


def test_recovered_weights_are_equal_in_every_bit_with_the_threads_that_made_them(
        tiny_model: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Matrices of 128 x 512 are large enough that torch shares them out; other numbers of threads then round otherwise."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = GPT2Config.from_pretrained(model, n_embd=128)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(model)
    study = resolve(study_of(path=str(model), corpus=str(stories), context_tokens=64, batch_tokens=2048, tasks=()))
    ledger, inputs = Ledger(tmp_path / "study"), read_inputs(study)
    ledger.write_study(StudyRecord(study=study, space="s", space_hash="h", root_key=inputs.root_key,
                                   provenance=provenance("CPU")))
    worker = Worker(study, ledger, inputs)
    worker.engine.micro_sequences = 8  # of 32: recovery knows of it as well
    torch.set_num_threads(2)
    record = run_round(worker, dense_round(worker), Action(sparsity=0.5, finetune_tokens=4096, learning_rate=1e-3))
    torch.set_num_threads(1)
    path, said = ledger.weights_path(record.key), []
    assert (record.provenance.num_threads, torch.get_num_threads()) == (2, 1)

    path.unlink()
    recover_weights(ledger, record.key, said.append)
    assert (file_sha256(path), torch.get_num_threads(), len(said)) == (record.weights_sha256, 1, 1)
    assert ledger.recovered(record.key) is None

    # a record that says something else about its making
    made_otherwise = record.model_copy(update={"provenance": record.provenance.model_copy(update={"num_threads": 1})})
    ledger.write_twice(f"rounds/{record.key}/record.json", made_otherwise)
    path.unlink()
    capsys.readouterr()
    recover_weights(ledger, record.key, said.append)
    assert "weights.safetensors was computed again and differs in bits from the lost one (device" in capsys.readouterr().err
    assert ledger.candidate(record.key) == made_otherwise  # the record's numbers stay apart from the new file's
    again = ledger.recovered(record.key)
    assert (again.sha256, again.provenance.num_threads) == ({"weights.safetensors": file_sha256(path)}, 1)
    assert file_sha256(path) != record.weights_sha256
    assert intact(ledger, made_otherwise)
    folder = export(ledger, record.key, tmp_path / "exported")
    assert "The numbers are of weights that were lost: those here were computed again" in (folder / "README.md").read_text()
