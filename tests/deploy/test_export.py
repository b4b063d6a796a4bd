import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import raysearch
from raysearch.deploy.export import export
from raysearch.study.records import RoundRecord
from raysearch.trial.round import load_candidate
from raysearch.trial.worker import Worker


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
