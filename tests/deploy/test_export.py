import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import raysearch
from raysearch.config import Action
from raysearch.deploy.export import export
from raysearch.kernels import device_name
from raysearch.models.sparse import SparseLinear
from raysearch.models.weights import stored_bytes
from raysearch.study.records import RoundRecord
from raysearch.trial.round import dense_round, load_candidate, report_round, run_round
from raysearch.trial.worker import Worker


@pytest.fixture(scope="module")
def candidate(worker: Worker) -> RoundRecord:
    worker.ledger.write_study(bench_record(worker))
    record = run_round(worker, dense_round(worker), Action(sparsity=0.7, finetune_tokens=1024, learning_rate=1e-3))
    report_round(worker, record)
    report_round(worker, dense_round(worker))
    return record


def bench_record(worker: Worker):
    from raysearch.study.provenance import provenance
    from raysearch.study.records import StudyRecord

    return StudyRecord(study=worker.study, space="test", space_hash="", root_key=worker.inputs.root_key,
                       provenance=provenance(device_name("cpu")))


def zeros(model: torch.nn.Module, worker: Worker) -> int:
    names = {p.name for p in worker.engine.prunables}
    return sum(int((p == 0).sum()) for name, p in model.named_parameters() if name in names)


def test_both_formats_hold_the_candidate(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> None:
    dense = export(worker.ledger, candidate.key, tmp_path / "dense")
    small = export(worker.ledger, candidate.key, tmp_path / "small", "compressed")
    plain = AutoModelForCausalLM.from_pretrained(dense)  # no raysearch needed
    models = [plain, raysearch.load(dense), raysearch.load(small, backend="dense")]
    tokens = AutoTokenizer.from_pretrained(dense)("The red dog of house 7 saw", return_tensors="pt")["input_ids"]
    for model in models:
        assert zeros(model, worker) == round(0.7 * candidate.num_prunable)
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
        assert model.lm_head.weight is model.transformer.wte.weight
    load_candidate(worker, candidate)
    weights = dict(plain.named_parameters())
    assert all(torch.equal(worker.engine.gather(name), weights[name]) for name in weights)

    file = small / "compressed.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size - header == candidate.stored_bytes
    assert (dense / "model.safetensors").stat().st_size > candidate.resident_bytes > candidate.stored_bytes


def test_a_compressed_model_runs_from_its_kept_weights(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> None:
    small = export(worker.ledger, candidate.key, tmp_path / "small", "compressed")
    model, dense = raysearch.load(small), raysearch.load(small, backend="dense")
    names = {p.name for p in worker.engine.prunables}
    assert names.isdisjoint(dict(model.named_parameters()))
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == len(names)
    assert sum(layer.sparse.num_bytes for layer in layers) == sum(
        stored_bytes(p.numel(), int(p.count_nonzero()), 4) for name, p in dense.named_parameters() if name in names)
    tokens = torch.arange(40).view(2, 20)
    assert torch.allclose(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    half = model.to(torch.bfloat16)  # another dtype: packed again
    assert torch.allclose(half(tokens).logits.float(), dense(tokens).logits, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="backend must be sparse or dense, got 'fast'"):
        raysearch.load(small, backend="fast")


def test_the_card_says_how_it_was_made_and_measured(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> None:
    folder = export(worker.ledger, candidate.key, tmp_path / "out")
    card = (folder / "README.md").read_text()
    metric = worker.ledger.report_metrics(candidate.key)["text/bits_per_byte"]
    assert f"| text/bits_per_byte | {metric.value:.4f}" in card
    assert f"{candidate.num_nonzero:,} of {candidate.num_parameters:,}" in card
    assert f"{candidate.stored_bytes:,}" in card
    assert "report split, which the search never saw" in card


def test_an_export_is_replaced_and_nothing_else(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> None:
    folder = export(worker.ledger, candidate.key, tmp_path / "out")
    assert export(worker.ledger, candidate.key, tmp_path / "out") == folder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="exists and is no export of raysearch"):
        export(worker.ledger, candidate.key, tmp_path / "mine")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "mine"}


def test_damage_is_found(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> None:
    folder = export(worker.ledger, candidate.key, tmp_path / "out")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is missing or differs from the recorded checksum"):
        raysearch.load(folder)
    assert json.loads((folder / "raysearch.json").read_text())["key"] == candidate.key

    stored = worker.ledger.round_directory(candidate.key) / "weights.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-100])
    try:
        with pytest.raises(ValueError, match="damaged after it was written"):
            export(worker.ledger, candidate.key, tmp_path / "again")
    finally:
        stored.write_bytes(whole)
    assert not (tmp_path / "again").exists()
