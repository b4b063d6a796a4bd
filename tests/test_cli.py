"""The commands as a user types them: what they print, and how they refuse."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysearch import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raysearch", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def refused(result: tuple[int, str, str], sentence: str, folder: Path) -> None:
    """Exit code 2, one sentence on stderr, no traceback, nothing written."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1, err
    assert err.startswith("raysearch: ")
    assert sentence in err
    assert not [path for path in folder.rglob("*") if path.name != "given"]


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--sparsity", 1.5], "target_sparsity: Input should be less than 1 (got 1.5)"),
    (["--sparsity", 0.2, "--initial-sparsity", 0.4], "target_sparsity"),
    (["--sparsity", 0.5, "--threshold", 0.1], "threshold and target_sparsity contradict each other"),
    (["--schedule", "constant", "--rate", 1.0, "--rounds", 2], "rate: Input should be less than 1 (got 1.0)"),
    (["--sparsity", 0.5, "--schedule", "square"], "schedule: Input should be 'one_shot'"),
    (["--sparsity", 0.5, "--finetune-epochs", 1], "finetune_epochs 1 needs text to train on, got no corpus; give --corpus"),
    (["--sparsity", 0.5, "--corpus", "none.txt"], "corpus 'none.txt': no such file or folder"),
    (["--sparsity", 0.5, "--dtype", "float8"], "dtype: Input should be 'auto', 'float32' or 'bfloat16' (got 'float8')"),
    ([], "target_sparsity"),
])
def test_contradictory_prunes_are_refused(run: Run, tiny_model: Path, tmp_path: Path, arguments: list, sentence: str) -> None:
    common = ["--context-tokens", 64, "--batch-tokens", 256]
    refused(run("prune", tiny_model, "--out", "out", *common, *arguments), sentence, tmp_path)


def test_bad_files_are_refused(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.write_text("")
    prune = ["prune", tiny_model, "--out", "out", "--sparsity", 0.5]
    refused(run("prune", "nowhere", "--out", "out", "--sparsity", 0.5), "model nowhere: no such folder", tmp_path)
    refused(run(*prune, "--corpus", "given"), "a file must end in .txt", tmp_path)
    refused(run("prune", tiny_model, "--out", given, "--sparsity", 0.5), "is a file; give a directory with --out", tmp_path)
    for command in ("results", "report", "status"):
        refused(run(command, "nowhere"), "no such study directory", tmp_path)
    refused(run("pick", "nowhere", "--max-bytes", "1GB"), "no such study directory", tmp_path)
    refused(run("export", "given", "--out", "out"), "not a pick of this version of raysearch", tmp_path)
    refused(run("sweep", "no.such.space"), "search space no.such.space: cannot be imported", tmp_path)
    refused(run("sweep", "search_spaces.demo", "--time-budget", "soon"), "--time-budget must be a positive time", tmp_path)
    refused(run("pretrain", "--preset", "huge"), "preset must be one of tiny", tmp_path)


@pytest.mark.parametrize(("content", "sentence"), [
    ("", "must define STUDY (a dict of settings) and space(trial)"),
    ("STUDY = {'model': 'm', 'epochs': 3}\ndef space(trial): return {}", ".STUDY: epochs: no such field"),
    ("STUDY = {'model': 'nowhere'}\ndef space(trial): return {}", "model nowhere: no such folder"),
    ("import nothing_of_that_name", "cannot be imported"),
])
def test_bad_spaces_are_refused(run: Run, tmp_path: Path, content: str, sentence: str) -> None:
    name = f"space_{abs(hash(content))}"
    (tmp_path / f"{name}.py").write_text(content)
    code, out, err = run("sweep", name, "--out", "study")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert sentence in err
    assert not (tmp_path / "study").exists()


def test_an_empty_corpus_is_refused(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    code, _, err = run("prune", tiny_model, "--out", "out", "--sparsity", 0.5, "--corpus", "empty.txt")
    assert (code, err.count("\n")) == (2, 1)
    assert "corpus empty.txt: holds no text" in err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_fit_is_refused(run: Run, tiny_model: Path, stories: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).write_bytes((tiny_model / name).read_bytes())
    code, _, err = run("prune", tmp_path / "small", "--out", "out", "--sparsity", 0.5, "--corpus", stories,
                       "--context-tokens", 64)
    assert (code, err.count("\n")) == (2, 1)
    assert "the tokenizer must fit the model's vocabulary of 200, but its largest id is 256" in err
    assert not (tmp_path / "out").exists()


def test_one_shot_prune_without_corpus_pruned_like_torch(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_model)
    for sparsity in (0.1, 0.3, 0.5):
        code, out, err = run("prune", tiny_model, "--out", f"out{sparsity}", "--sparsity", sparsity)
        assert code == 0, err
        assert f"sparsity {sparsity:.4f}" in out
        pruned = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{sparsity}" / "model")
        assert_pruned_like_torch(dense, pruned, sparsity)


def assert_pruned_like_torch(dense: torch.nn.Module, pruned: torch.nn.Module, sparsity: float) -> None:
    """Bit for bit the masks of a stable sort of all magnitudes, and the kept weights untouched."""
    pairs = [(before, after) for (name, before), after in zip(dense.named_parameters(), pruned.parameters())
             if ".h." in name and before.dim() == 2]
    flat = torch.cat([before.flatten() for before, _ in pairs])
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.float().abs().argsort(stable=True)[:round(sparsity * len(flat))]] = False
    assert torch.equal(torch.cat([after.flatten() for _, after in pairs]), torch.where(keep, flat, 0))


BOOKS_30M = Path(__file__).parent.parent.parent / "shared" / "models" / "books-30m"


@pytest.mark.skipif(not BOOKS_30M.is_dir(), reason="the measuring checkpoint is not on this machine")
def test_books_30m_is_pruned_like_torch(run: Run, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(BOOKS_30M, dtype=torch.bfloat16)
    for sparsity in (0.1, 0.3, 0.5):
        code, _, err = run("prune", BOOKS_30M, "--out", f"out{sparsity}", "--sparsity", sparsity)
        assert code == 0, err
        pruned = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{sparsity}" / "model")
        assert pruned.dtype == torch.bfloat16
        assert_pruned_like_torch(dense, pruned, sparsity)


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


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in ("demo", "pretrain", "prune", "sweep", "results", "report", "pick", "export", "evaluate", "tasks"):
        assert f" {name} " in out


def evaluated(run: Run, *command: object) -> tuple[dict, str]:
    """(what --json prints, stderr)."""
    code, out, err = run("evaluate", *command, "--json")
    assert code == 0, err
    return json.loads(out), err


def test_evaluate_runs_a_pruned_model_on_sparse_kernels(run: Run, tiny_model: Path, tmp_path: Path, stories: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    assert run("prune", tiny_model, "--out", "pruned", "--sparsity", 0.95, "--prunable", "matrices")[0] == 0
    common = ("--tasks", "text", "--corpus", stories, "--limit", 4)
    auto, err = evaluated(run, "pruned/model", *common)
    lines = [line for line in err.splitlines() if line.startswith("kernels: ")]
    assert len(lines) == 1, err
    (num_tokens, used), = auto["kernels"].items()
    assert num_tokens == "1024"
    assert sum(used["layers"].values()) == 8
    assert (used["model_ratio"] > 1) == any(name != "dense" for name in used["layers"])
    assert "8 sparse layers" in lines[0]
    assert f"at 1024 tokens, the model {used['model_ratio']:.2f} times as fast as dense" in lines[0]
    plain, err = evaluated(run, "pruned/model", *common, "--backend", "dense")
    assert (plain["kernels"], "kernels:" in err) == ({}, False)
    assert auto["results"]["text"]["bits_per_byte"] == pytest.approx(plain["results"]["text"]["bits_per_byte"], rel=1e-5)
    code, _, err = run("evaluate", "pruned/model", *common, "--backend", "sparse")
    assert (code, err.strip().splitlines()[-1].endswith("backend must be auto or dense, got 'sparse'")) == (2, True)


def test_evaluate_times_nothing_for_a_model_that_is_not_sparse(run: Run, tiny_model: Path, stories: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.evaluate.sparsify_for_inference", None)
    monkeypatch.setattr("raysearch.evaluate.worth_timing", None)
    found, err = evaluated(run, tiny_model, "--tasks", "text", "--corpus", stories, "--limit", 2)
    assert (found["kernels"], "kernels:" in err) == ({}, False)


def test_an_unknown_task_is_answered_within_seconds(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    start = time.process_time()
    code, out, err = run("evaluate", tiny_model, "--tasks", "hellaswagg")
    assert time.process_time() - start < 5  # lm-eval's index alone takes 7 to 13
    assert (code, out) == (2, "")
    assert err.startswith("raysearch: task 'hellaswagg' is not known; the nearest names are hellaswag, ")


def test_kernels_shows_what_every_layer_runs_on(run: Run, tiny_model: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".h." in name:
            parameter.data[parameter.abs() < parameter.abs().flatten().quantile(0.9)] = 0
    model.save_pretrained(tmp_path / "given")
    code, out, err = run("kernels", tmp_path / "given", "--tokens", "16,64")
    assert code == 0, err
    assert out.count("transformer.h.") == 2 * 4 * 2  # layers of 2 blocks, each at 16 and at 64 tokens
    assert "whole forward, 16 tokens: " in out
    assert "ratio" in out
    assert len(json.loads((tmp_path / "cache" / "kernels" / "decisions.json").read_text())) >= 4
    code, out, err = run("kernels", tiny_model)
    assert (code, "no layer is sparse enough to try" in out) == (0, True), err
    assert "--tokens must be whole numbers of 1 or more, comma-separated, got '4,x'" in run(
        "kernels", tiny_model, "--tokens", "4,x")[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_bench_kernels_needs_a_gpu_or_asks_for_none(run: Run, tmp_path: Path) -> None:
    refused(run("bench-kernels", "--out", "x.json"), "--cases must needs a CUDA GPU, and torch sees none here", tmp_path)
    refused(run("bench-kernels", "--out", "x.json", "--cases", "all"), "--cases must be one of must, grid, cpu, got 'all'",
            tmp_path)
