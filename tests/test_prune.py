"""One trial in this process: pruned bit for bit as torch would, found again, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_shot_prune_without_corpus_pruned_like_torch(run: Run, tiny_model: Path, tmp_path: Path,
                                                         dtype: torch.dtype) -> None:
    """In bf16 many magnitudes are equal, so that ties decide."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    dense.save_pretrained(shutil.copytree(tiny_model, tmp_path / "dense"))
    for sparsity in (0.1, 0.3, 0.5):
        code, out, err = run("prune", tmp_path / "dense", "--out", f"out{sparsity}", "--sparsity", sparsity)
        assert code == 0, err
        assert f"sparsity {sparsity:.4f}" in out
        pruned = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{sparsity}" / "model")
        assert pruned.dtype == dtype
        assert_pruned_like_torch(dense, pruned, sparsity)


def assert_pruned_like_torch(dense: torch.nn.Module, pruned: torch.nn.Module, sparsity: float) -> None:
    """Bit for bit the masks of a stable sort of all magnitudes, and the kept weights untouched."""
    pairs = [(before, after) for (name, before), after in zip(dense.named_parameters(), pruned.parameters())
             if ".h." in name and before.dim() == 2]
    flat = torch.cat([before.flatten() for before, _ in pairs])
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.float().abs().argsort(stable=True)[:round(sparsity * len(flat))]] = False
    assert torch.equal(torch.cat([after.flatten() for _, after in pairs]), torch.where(keep, flat, 0))


def test_a_prune_is_shown_by_its_first_metric(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "lambada").mkdir(parents=True)
    lines = [json.dumps({"text": f"The dog of house {n} ran home to house {n}"}) for n in range(20)]
    (tmp_path / "data" / "lambada" / "test.jsonl").write_text("\n".join(lines))
    code, out, err = run("prune", tiny_model, "--out", "out", "--sparsity", 0.5, "--tasks", "lambada", "--data-dir", "data")
    assert code == 0, err
    assert "lambada/perplexity " in out
    code, out, err = run("results", "out")
    assert code == 0, err
    assert "selection and report: lambada/perplexity" in out


def test_prune_with_fine_tuning_is_found_again(run: Run, tiny_model: Path, stories: Path, tmp_path: Path) -> None:
    command = ["prune", tiny_model, "--out", "out", "--sparsity", 0.6, "--schedule", "cubic", "--rounds", 2, "--corpus",
               stories, "--finetune-epochs", 0.05, "--context-tokens", 64, "--batch-tokens", 256, "--eval-items", 5,
               "--tasks", "text,last_word"]
    code, first, err = run(*command)
    assert code == 0, err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "rounds").rglob("*.json")}
    assert len(before) == 3 + 2  # dense and two rounds; dense and the last on the report split
    assert run(*command)[:2] == (0, first)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "rounds").rglob("*.json")}
    code, out, _ = run("results", "out", "--format", "json")
    rows = json.loads(out)
    assert [round(row["sparsity"], 3) for row in rows] == [0.0, 0.525, 0.6]
    assert all(row["report/text/bits_per_byte"] for row in (rows[0], rows[2]))
    code, out, err = run("pick", "out", "--max-drop", "text/bits_per_byte=9")
    assert code == 0, err
    assert run("export", "out/pick.json", "--out", "deploy", "--format", "sparse")[0] == 0
    code, out, err = run("evaluate", "deploy", "--tasks", "text", "--corpus", stories, "--json")
    assert code == 0, err
    assert json.loads(out)["results"]["text"]["num_items"] > 0


def spoilt(folder: Path, change: Callable[[torch.nn.Module], object]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model.transformer)
    model.save_pretrained(folder)


def replaced(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(("damage", "sentence"), [
    (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors is damaged or cut short"),
    (lambda folder: os.truncate(folder / "model.safetensors", 0), "model.safetensors is empty"),
    (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"), "Git LFS pointer"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors file in it"),
    (lambda folder: (folder / "config.json").write_text("<html>"), "its config.json cannot be read"),
    (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json is damaged"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "its tokenizer"),
    (lambda folder: spoilt(folder, lambda body: body.h[1].mlp.c_fc.weight[0].fill_(torch.nan)), "holds 128 of 4096"),
    (lambda folder: replaced(folder / "config.json", '"n_layer": 2', '"n_layer": 1'), "left over (transformer.h.1."),
    (lambda folder: spoilt(folder, lambda body: body.ln_f.bias.normal_(0, 30)), "the dense model: quality at chance"),
    (lambda folder: spoilt(folder, lambda body: body.ln_f.bias.fill_(3e38)), "the dense model: "),
], ids=["truncated", "empty", "pointer", "gone", "config", "generation", "tokenizer", "NaN", "layer", "chance", "overflow"])
def test_a_model_that_cannot_be_served_is_one_sentence_and_leaves_nothing(
        run: Run, tiny_model: Path, stories: Path, tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    """And the same command works once the model is mended."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    damage(model)
    command = ["prune", model, "--out", "out", "--sparsity", 0.5, "--corpus", stories, "--eval-items", 3]
    code, out, err = run(*command)
    assert (code, err.count("\n"), out) == (2, 1, ""), err
    assert sentence in err
    assert not (tmp_path / "out").exists()
    shutil.rmtree(model)
    shutil.copytree(tiny_model, model)
    code, _, err = run(*command)
    assert code == 0, err


def test_a_refused_folder_stays_as_it_was(run: Run, tiny_model: Path, stories: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    code, _, err = run("prune", tiny_model, "--out", "mine", "--sparsity", 0.5)
    assert (code, "holds something else (thesis.tex)" in err) == (2, True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    zeros = shutil.copytree(tiny_model, tmp_path / "zeros")
    weights = load_file(zeros / "model.safetensors")
    save_file({name: weight * 0 for name, weight in weights.items()}, zeros / "model.safetensors", {"format": "pt"})
    code, _, err = run("prune", zeros, "--out", "empty", "--sparsity", 0.5, "--corpus", stories, "--eval-items", 3)
    assert (code, "quality at chance: token perplexity 257 is not below 257" in err) == (2, True), err
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_trial_that_diverges_is_one_sentence_and_another_may_follow(run: Run, tiny_model: Path, stories: Path,
                                                                      tmp_path: Path) -> None:
    """One step: its loss is fine, the weights after it are not."""
    command = ["prune", tiny_model, "--out", "out", "--sparsity", 0.5, "--corpus", stories, "--eval-items", 3,
               "--context-tokens", 64, "--batch-tokens", 1024, "--finetune-epochs", 0.01]
    code, _, err = run(*command, "--learning-rate", 1e30)
    assert (code, err.count("\n")) == (2, 1), err
    assert "the trial failed in round 1: the log-probability of item 0 of task text is nan" in err
    code, _, err = run(*command, "--learning-rate", 1e-3)
    assert code == 0, err


def test_partitioned_weights_are_exported_in_the_same_process(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    """Under ZeRO-3, and from names that a wrapper left, which transformers' own report does not tell there."""
    model = shutil.copytree(tiny_model, tmp_path / "compiled")
    weights = load_file(model / "model.safetensors")
    save_file({f"_orig_mod.{name}": weight for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    for number, command in enumerate(((tiny_model, "--zero-stage", 0), (model, "--zero-stage", 3))):
        code, _, err = run("prune", *command, "--out", f"out{number}", "--sparsity", 0.5)
        assert code == 0, err
    whole, partitioned = (load_file(tmp_path / f"out{number}" / "model" / "model.safetensors") for number in range(2))
    assert whole.keys() == partitioned.keys()
    assert all(torch.equal(whole[name], partitioned[name]) for name in whole)


def test_another_type_of_weights_is_said(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16).save_pretrained(model)
    code, out, err = run("prune", model, "--out", "out", "--sparsity", 0.5)
    assert code == 0, err
    assert out.splitlines()[0] == "the model's weights are stored in float16; here, and in an export, they are float32"
    code, out, err = run("status", "out")  # of a study without tasks
    assert (code, "dense not scored yet" in out) == (0, True), err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("this sandbox may not mount")
    try:
        result = subprocess.run([sys.executable, "-m", "raysearch", "prune", tiny_model, "--out", disk / "out", "--sparsity",
                                 "0.5"], capture_output=True, text=True, check=False,
                                env={name: value for name, value in os.environ.items() if name != "RANK"})
        assert result.returncode == 2, result.stderr
        assert "No space left on device" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert not list((disk / "out").glob("rounds/*/weights*"))
        assert not list((disk / "out").glob("rounds/.*"))
    finally:
        subprocess.run(["umount", disk], check=True)
