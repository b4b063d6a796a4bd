"""One trial in this process: pruned bit for bit as torch would, found again, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Run
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
    assert run("export", "out/pick.json", "--out", "deploy", "--format", "compressed")[0] == 0
    code, out, err = run("evaluate", "deploy", "--tasks", "text", "--corpus", stories, "--json")
    assert code == 0, err
    assert json.loads(out)["results"]["text"]["num_items"] > 0


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
