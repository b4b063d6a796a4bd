"""The commands as a user types them: what they print, and how they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Run
from transformers import AutoModelForCausalLM


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


def test_trials_from_a_file_are_refused_in_one_sentence(run: Run, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.write_text('{"target_sparsity": 2}')
    sweep = ["sweep", "search_spaces.demo", "--out", "study", "--trials-from"]
    refused(run(*sweep, given, "--trials", 3), f"--trials 3 and --trials-from {given} contradict each other: the file says how "
            "many; give one of them", tmp_path)
    refused(run(*sweep, given), f"--trials-from {given}, line 1: target_sparsity: Input should be less than 1", tmp_path)
    refused(run(*sweep, "nowhere"), "--trials-from nowhere: cannot be read", tmp_path)


@pytest.mark.parametrize(("content", "sentence"), [
    ("", "must define STUDY (a dict of settings) and space(trial)"),
    ("STUDY = {'model': {'path': 'm'}, 'epochs': 3}\ndef space(trial): return {}", ".STUDY: epochs: no such field"),
    ("STUDY = {'model': {'path': 'nowhere'}}\ndef space(trial): return {}", "model nowhere: no such folder"),
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


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in ("demo", "pretrain", "prune", "sweep", "results", "report", "pick", "export", "evaluate", "tasks"):
        assert f" {name} " in out


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


@pytest.mark.parametrize(("arguments", "code"), [
    ("tasks", 0), ("sweep nosuch.module", 2), ("plan nosuch.module", 2), ("sweep search_spaces.demo --keep x", 2),
    ("status /none", 2), ("results /none", 2), ("pick /none --max-drop text/acc=1", 2), ("export /none --out x", 2),
    ("prune /none --sparsity 0.5 --out x", 2), ("kernels /none", 2), ("pretrain --preset nosuch", 2), ("nosuch", 2),
    ("evaluate MODEL --tasks hellaswagg", 2), ("sweep mistyped", 2),
    ("evaluate MODEL --tasks text --backend x", 2), ("prune MODEL --tasks hellaswagg --out x", 2),
    ("prune MODEL --sparsity 1.5 --out x", 2), ("prune MODEL --scope x --out x", 2), ("plan mistyped", 2),
    ("kernels MODEL/config.json", 2)])
def test_what_is_mistyped_is_told_before_anything_heavy_is_imported(arguments: str, code: int, tiny_model: Path,
                                                                            tmp_path: Path) -> None:
    (tmp_path / "mistyped.py").write_text("STUDY = {'model': {'path': '/none'}}\ndef space(trial): return {}")
    arguments = arguments.replace("MODEL", str(tiny_model))
    heavy = ("torch", "ray", "optuna", "deepspeed", "transformers", "lm_eval", "datasets")
    script = (f"import sys; sys.argv = {['raysearch', *arguments.split()]!r}\n"
              "from raysearch.cli import main\n"
              "try:\n    main()\n"
              f"except SystemExit as end:\n    code = end.code\nelse:\n    code = 0\n"
              f"print([name for name in {heavy!r} if name in sys.modules], code or 0)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines()[-1] == f"[] {code}", done.stderr
