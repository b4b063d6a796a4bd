import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import Run
from families import STRANGERS, random_model
from faults import refusing
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import raysearch
from raysearch.config import Action
from raysearch.deploy.export import export
from raysearch.prune import run_prune
from raysearch.study.ledger import Ledger
from raysearch.study.records import RoundRecord
from raysearch.trial.round import dense_round, load_candidate, run_round
from raysearch.trial.worker import Worker


def zeros(model: torch.nn.Module, worker: Worker) -> int:
    names = {p.name for p in worker.engine.prunables}
    return sum(int((p == 0).sum()) for name, p in model.named_parameters() if name in names)


def test_both_formats_hold_the_candidate(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> None:
    dense = export(worker.ledger, candidate.key, tmp_path / "dense")
    small = export(worker.ledger, candidate.key, tmp_path / "small", "sparse")
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

    file = small / "raysearch.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size - header == candidate.stored_bytes
    assert (dense / "model.safetensors").stat().st_size > candidate.resident_bytes > candidate.stored_bytes


@pytest.mark.parametrize(("pattern", "scope", "is_plain"), [("neuron", "layer", True), ("neuron", "global", False),
                                                            ("head", "layer", False)])
def test_a_compact_export_is_what_is_left(worker: Worker, candidate: RoundRecord, tmp_path: Path, pattern: str, scope: str,
                                          is_plain: bool) -> None:
    """Parameters are counted in the file; its logits are the masked ones; GPT-2's configuration cannot say other heads."""
    fields = {"criterion": "l2", "sparsity": 0.5} if pattern == "neuron" else {"sparsity": 0.5}
    record = run_round(worker, dense_round(worker), Action(pattern=pattern, scope=scope, finetune_tokens=256,
                                                           learning_rate=1e-3, **fields))
    masked = raysearch.load(export(worker.ledger, record.key, tmp_path / "dense"))
    folder = export(worker.ledger, record.key, tmp_path / "compact", "compact")
    (file,) = folder.glob("*.safetensors")
    found, tokens = raysearch.load(folder), torch.arange(40).view(2, 20)
    num_parameters = sum(parameter.numel() for parameter in found.parameters())
    assert num_parameters == sum(tensor.numel() for tensor in load_file(file).values()) < record.num_parameters
    wanted = masked(tokens).logits.detach()
    assert torch.allclose(found(tokens).logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert found.generate(tokens[:1], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 23)
    assert f"| parameters of this compact form | {num_parameters:,} |" in (folder / "README.md").read_text()
    assert is_plain == (file.name == "model.safetensors")
    if is_plain:
        plain = AutoModelForCausalLM.from_pretrained(folder)  # no raysearch needed
        assert torch.equal(plain(tokens).logits, found(tokens).logits)


@pytest.mark.parametrize(("format", "fields"), [
    ("compact", {"criterion": "l0", "pattern": "head", "scope": "layer", "score_rate": 0.1, "mask_interval_steps": 1}),
    ("compact", {"criterion": "l0", "pattern": "neuron", "score_rate": 0.1, "gate_penalty": 1.0, "mask_interval_steps": 1}),
    ("compact", {"criterion": "l2", "pattern": "neuron", "group_lambda": 5.0}),
    ("compact", {"criterion": "movement", "pattern": "hybrid", "mask_interval_steps": 1}),
    ("sparse", {"pattern": "block"}),
])
def test_what_acts_on_units_is_kept_through_training_and_exported(worker: Worker, candidate: RoundRecord, tmp_path: Path,
                                                                  format: str, fields: dict) -> None:
    """And once more from the stored candidate, after which what was gone is gone."""
    record = run_round(worker, dense_round(worker), Action(sparsity=0.5, finetune_tokens=1024, learning_rate=1e-3, **fields))
    gone = {p.name: worker.engine.gather(p.name) == 0 for p in worker.engine.prunables}
    assert sum(int(each.sum()) for each in gone.values()) == round(record.sparsity * record.num_prunable) > 4000
    masked = raysearch.load(export(worker.ledger, record.key, tmp_path / "dense"))
    found, tokens = raysearch.load(export(worker.ledger, record.key, tmp_path / "out", format)), torch.arange(40).view(2, 20)
    wanted = masked(tokens).logits.detach()
    assert torch.allclose(found(tokens).logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    again = run_round(worker, record, Action(sparsity=0.0, finetune_tokens=1024, learning_rate=1e-3))
    assert again.sparsity >= record.sparsity
    assert not any(worker.engine.gather(name)[mask].any() for name, mask in gone.items())


@pytest.mark.parametrize("fields", [{}, {"pattern": "neuron", "scope": "layer", "sparsity": 0.4}])  # 51 dead of 128
def test_what_has_nothing_to_cut_is_not_exported_as_compact(worker: Worker, candidate: RoundRecord, tmp_path: Path,
                                                            fields: dict) -> None:
    record = run_round(worker, dense_round(worker), Action(**fields)) if fields else candidate
    with pytest.raises(ValueError, match="no dead layer, head or neuron, or fewer than 64 neurons, .*; give format sparse"):
        export(worker.ledger, record.key, tmp_path / "out", "compact")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["mpt", "phi3"])
def test_a_family_that_is_not_known_is_not_exported_as_compact(family: str, tmp_path: Path) -> None:
    random_model(STRANGERS[family]()).save_pretrained(tmp_path / "base")
    run_prune({"model": str(tmp_path / "base"), "corpus": None, "tasks": ()}, {"target_sparsity": 0.5}, tmp_path / "out", str)
    ledger = Ledger(tmp_path / "out")
    with pytest.raises(ValueError, match=f"neurons stay in, for those of {family} are not known; give format sparse$"):
        export(ledger, ledger.trials()[0].keys[-1], tmp_path / "small", "compact")


@pytest.mark.parametrize("format", ["hf", "sparse", "compact"])
def test_an_export_that_does_not_open_as_the_candidate_is_not_left(
        worker: Worker, candidate: RoundRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """A loader that loses one weight, as of a family whose names are mapped otherwise."""
    record = run_round(worker, dense_round(worker), Action(pattern="neuron", scope="layer", sparsity=0.5))

    def spoilt(folder: Path, backend: str) -> torch.nn.Module:
        model = raysearch.load(folder, backend)
        model.transformer.wte.weight.data[3, 4] += 1
        return model

    monkeypatch.setattr("raysearch.deploy.export.load", spoilt)
    with pytest.raises(RuntimeError, match="the export does not open as the candidate .*wte.weight.*; nothing was written"):
        export(worker.ledger, record.key, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_an_export_is_replaced_and_nothing_else(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> None:
    folder = export(worker.ledger, candidate.key, tmp_path / "out")
    assert export(worker.ledger, candidate.key, tmp_path / "out") == folder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="exists and is no export of raysearch"):
        export(worker.ledger, candidate.key, tmp_path / "mine")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "mine"}


@pytest.mark.parametrize("format", ["hf", "sparse"])
def test_a_disk_that_is_full_is_named_and_keeps_nothing(format: str, worker: Worker, candidate: RoundRecord,
                                                        tmp_path: Path) -> None:
    with refusing(), pytest.raises(OSError, match=r"out.*: cannot be written \(.*File too large|File too large: '.*out'"):
        export(worker.ledger, candidate.key, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


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


def test_an_export_keeps_what_belongs_to_a_model(tiny_model: Path, tmp_path: Path) -> None:
    """Settings of generation that transformers reads and would not write, two chat templates, terms; no optimizer's state."""
    model = tmp_path / "base"
    shutil.copytree(tiny_model, model)
    kept = {"generation_config.json": '{"eos_token_id": [0, 7], "do_sample": false, "temperature": 0.6}',
            "chat_template.jinja": "{{ messages }}", "additional_chat_templates/tool.jinja": "{{ tools }}", "LICENSE": "ours",
            "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}'}
    for name, content in {**kept, "optimizer.pt": "x", "notes.md": "x"}.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
    dense = run_prune({"model": str(model), "corpus": None, "tasks": ()}, {"target_sparsity": 0.5}, tmp_path / "out", str)
    ledger = Ledger(tmp_path / "out")
    small = export(ledger, ledger.trials()[0].keys[-1], tmp_path / "small", "sparse")
    for folder in (dense, small):
        assert {name: (folder / name).read_text() for name in kept} == kept
        assert not {"optimizer.pt", "notes.md"} & {file.name for file in folder.iterdir()}
        assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
        assert raysearch.load(folder).generation_config.eos_token_id == [0, 7]
        ids = [AutoTokenizer.from_pretrained(path)("dog")["input_ids"] for path in (model, folder)]
        assert ids[0] == ids[1] != []


def test_a_model_without_a_tokenizer_is_exported_without_one(run: Run, tiny_model: Path, stories: Path, tmp_path: Path) -> None:
    """It can be pruned and fine-tuned on nothing; where text is read, a sentence says what is missing, and nothing is left."""
    model = tmp_path / "base"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("tokenizer*"))
    assert run("prune", model, "--out", "out", "--sparsity", 0.5)[0] == 0
    assert not list((tmp_path / "out" / "model").glob("*token*"))
    for command in (("prune", model, "--out", "text", "--sparsity", 0.5, "--corpus", stories),
                    ("prune", model, "--out", "text", "--sparsity", 0.5, "--tasks", "lambada", "--data-dir", tmp_path),
                    ("evaluate", model, "--tasks", "text", "--corpus", stories),
                    ("evaluate", "out/model", "--tasks", "text", "--corpus", stories)):
        code, _, err = run(*command)
        assert (code, err.count("\n")) == (2, 1), err
        assert "its tokenizer has no tokens, or its files are missing; save the tokenizer into the same folder" in err
    assert not (tmp_path / "text").exists()


def test_a_head_that_is_not_the_embedding_stays_apart(tiny_model: Path, tmp_path: Path) -> None:
    """config.json says that they are tied, and the checkpoint holds two."""
    model = shutil.copytree(tiny_model, tmp_path / "base")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].flip(0).contiguous()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    dense = run_prune({"model": str(model), "corpus": None, "tasks": ()}, {"target_sparsity": 0.5}, tmp_path / "out", str)
    ledger = Ledger(tmp_path / "out")
    small = export(ledger, ledger.trials()[0].keys[-1], tmp_path / "small", "sparse")
    tokens = torch.arange(24)[None]
    plain = AutoModelForCausalLM.from_pretrained(dense)
    assert torch.equal(plain.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(raysearch.load(small, backend="dense")(tokens).logits, plain(tokens).logits)
