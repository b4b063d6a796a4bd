"""Every family of Hugging Face's: pruned, fine-tuned, exported in every format, loaded, scored as the dense model is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import Run
from families import CASES, KNOWN, STRANGERS, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import raysearch
from raysearch.deploy.export import export
from raysearch.evaluate import evaluate_model
from raysearch.prune import run_prune
from raysearch.study.ledger import Ledger

ISSUE = (*(name for name in KNOWN if name not in ("gemma", "granite", "olmo", "starcoder2")),
         "mixtral", "olmo2", "mpt", "mamba")
"""The 22 families that must work."""


def saved(family: str, tokenizer_of: Path, folder: Path) -> Path:
    random_model((CASES | STRANGERS)[family]()).save_pretrained(folder)
    for file in tokenizer_of.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_the_22_are_22() -> None:
    assert len(ISSUE) == 22


@pytest.mark.parametrize("family", sorted({*ISSUE, *STRANGERS, "falcon 40b", "falcon with slopes"}))
def test_a_family_goes_through_prune_fine_tuning_both_formats_and_scoring(
        family: str, tiny_model: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    model = saved(family, tiny_model, tmp_path / "model")
    study = {"model": str(model), "corpus": str(stories), "tasks": (), "context_tokens": 32, "batch_tokens": 64,
             "epoch_tokens": 128}
    run_prune(study, {"target_sparsity": 0.6, "finetune_epochs": 1.0, "learning_rate": 1e-3}, tmp_path / "out", lambda _: None)
    ledger = Ledger(tmp_path / "out")
    record = ledger.candidate(ledger.trials()[0].keys[-1])
    assert record.sparsity == pytest.approx(0.6, abs=1e-4)
    assert record.num_prunable > 0.75 * (record.num_parameters - 2 * 257 * 32) - 64 * 32  # all but embeddings and vectors
    dense, small = ledger.directory / "model", export(ledger, record.key, tmp_path / "small", "sparse")

    tokens = torch.arange(24).view(2, 12)
    plain = AutoModelForCausalLM.from_pretrained(dense)(tokens).logits  # no raysearch needed
    assert torch.equal(raysearch.load(dense)(tokens).logits, plain)
    assert torch.equal(raysearch.load(small, backend="dense")(tokens).logits, plain)
    assert torch.allclose(raysearch.load(small)(tokens).logits, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))

    lines: list[str] = []
    options = {"data_dir": None, "corpus": str(stories), "limit": 3, "num_fewshot": None, "batch_tokens": None,
               "samples": None, "progress": False, "say": lines.append}
    wanted, *found = (evaluate_model(str(folder), ["text", "last_word"], backend=backend, **options)["results"]
                      for folder, backend in ((dense, "dense"), (dense, "auto"), (small, "auto")))
    for results in found:
        for task, values in results.items():
            assert values["num_items"] == wanted[task]["num_items"]
            assert {k: v for k, v in values.items() if v is not None} == pytest.approx(
                {k: v for k, v in wanted[task].items() if v is not None}, rel=1e-4)
    assert any(line.startswith("left dense: dead heads and neurons stay in") for line in lines) == (family in STRANGERS)


@pytest.mark.parametrize("family", [*(name for name in ISSUE if name in KNOWN), *(name for name in CASES if "norms" in name)])
def test_pruned_heads_are_cut_out_of_the_export(family: str, tiny_model: Path, tmp_path: Path) -> None:
    compact_is_what_was_masked(family, "head", tiny_model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["head", "neuron", "layer"])
@pytest.mark.parametrize("family", CASES)
def test_pruned_heads_neurons_and_layers_are_cut_out_of_the_export(family: str, pattern: str, tiny_model: Path, tmp_path: Path
                                                             ) -> None:
    compact_is_what_was_masked(family, pattern, tiny_model, tmp_path)


def compact_is_what_was_masked(family: str, pattern: str, tiny_model: Path, tmp_path: Path) -> None:
    model = saved(family, tiny_model, tmp_path / "model")
    folder = run_prune({"model": str(model), "corpus": None, "tasks": ()}, {"target_sparsity": 0.5, "pattern": pattern},
                       tmp_path / "out", lambda _: None)
    ledger = Ledger(tmp_path / "out")
    record = ledger.candidate(ledger.trials()[0].keys[-1])
    small = export(ledger, record.key, tmp_path / "small", "compact")
    cut, whole, tokens = raysearch.load(small), raysearch.load(folder), torch.arange(24).view(2, 12)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters())
    assert record.compact_parameters == sum(p.numel() for p in cut.parameters())
    assert record.resident_bytes == tensor_bytes(small)
    bits = export(ledger, record.key, tmp_path / "bits", "sparse")
    assert record.stored_bytes == min(tensor_bytes(bits), tensor_bytes(small))
    cut.generate(tokens[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    wanted = whole(tokens).logits.detach()
    assert torch.allclose(cut(tokens).logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def tensor_bytes(folder: Path) -> int:
    """Of an export's weights, without the header."""
    (file,) = folder.glob("*.safetensors")
    return file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.slow
@pytest.mark.parametrize("family", ISSUE)
def test_a_family_goes_through_the_command_line(run: Run, family: str, tiny_model: Path, stories: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained for a moment, since what is no better than chance is refused."""
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    folder = saved(family, tiny_model, tmp_path / "model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((CASES | STRANGERS)[family]())
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(stories.read_text())["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for start in range(0, 60 * 256, 256):
        batch = tokens[start:start + 256].view(8, 32)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    settings = ("--corpus", stories, "--tasks", "text,last_word,choice", "--eval-items", 4, "--context-tokens", 64,
                "--batch-tokens", 256, "--finetune-epochs", 0.01)
    for command in (("prune", folder, "--out", "out", "--sparsity", 0.5, *settings), ("results", "out"),
                    ("pick", "out", "--max-drop", "text/bits_per_byte=9"),
                    ("export", "out/pick.json", "--out", "dense"), ("kernels", "dense", "--tokens", "1,64"),
                    ("export", "out/pick.json", "--out", "small", "--format", "sparse")):
        code, _, err = run(*command)
        assert code == 0, (command, err)
    scores = []
    for exported, backend in (("dense", "dense"), ("dense", "auto"), ("small", "auto")):
        code, out, err = run("evaluate", exported, "--tasks", "text,last_word", "--corpus", stories, "--limit", 4, "--backend",
                             backend, "--json")
        assert code == 0, err
        scores.append(json.loads(out)["results"]["text"]["bits_per_byte"])
    assert scores[1:] == pytest.approx([scores[0]] * 2, rel=1e-4)
