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


@pytest.mark.parametrize("out", ["given/x", "given/x/y", "a" * 300])
def test_a_place_that_cannot_be_written_is_one_sentence(run: Run, tmp_path: Path, out: str, tiny_model: Path) -> None:
    (tmp_path / "given").write_text("")
    refused(run("prune", tiny_model, "--sparsity", 0.5, "--out", out), "give a place with --out that can be", tmp_path)


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
    ("kernels MODEL/config.json", 2), ("pretrain --corpus x.txt --out x", 2), ("prune MODEL --corpus ./x --out x", 2),
    ("evaluate MODEL --tasks text --corpus x.jsonl", 2), ("prune MODEL --corpus a.jsonl --text-field x --out x", 2),
    ("sweep no_corpus --out x", 2), ("plan no_corpus", 2)])
def test_what_is_mistyped_is_told_before_anything_heavy_is_imported(arguments: str, code: int, tiny_model: Path,
                                                                            tmp_path: Path) -> None:
    (tmp_path / "mistyped.py").write_text("STUDY = {'model': {'path': '/none'}}\ndef space(trial): return {}")
    study = {"model": {"path": str(tiny_model)}, "data": {"corpus": "x.txt"}}
    (tmp_path / "no_corpus.py").write_text(f"STUDY = {study}\ndef space(trial): return {{}}")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    arguments = arguments.replace("MODEL", str(tiny_model))
    heavy = ("torch", "ray", "optuna", "deepspeed", "transformers", "lm_eval", "datasets")
    script = (f"import sys; sys.argv = {['raysearch', *arguments.split()]!r}\n"
              "from raysearch.cli import main\n"
              "try:\n    main()\n"
              f"except SystemExit as end:\n    code = end.code\nelse:\n    code = 0\n"
              f"print([name for name in {heavy!r} if name in sys.modules], code or 0)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines()[-1] == f"[] {code}", done.stderr


GIVEN = {  # files that the cases below name
    "utf16.jsonl": b'\xff\xfe{\x00"\x00', "latin.txt": b"caf\xe9", "list.jsonl": b'{"text": ["a"]}',
    "torn.jsonl.gz": b"\x1f\x8b\x08\x00",
    "blank.txt": b" \n", "rows.jsonl": b"[1]", "field.jsonl": b'{"story": "a"}', "short.txt": b"one two", "a.pdf": b"x",
    "data/hellaswag/validation.jsonl": b'{"ctx": "a", "endings": ["", "b"], "label": 1}\n',
    "data/lambada/test.jsonl": b'{"text": 1}',
    "data/storycloze/test.csv": b"a,b\n1,2\n", "data/nq_open/validation.jsonl": b"caf\xe9", "empty.json": b"{}",
    "null.py": b"x = 1\n\0",
    "half.json": b'[{"text": "a"}, {"tale": "b"}]', "file": b"",
    "no_space.py": b"STUDY = {'model': {'path': 'm'}}", "syntax.py": b"STUDY = {\n", "raises.py": b"1 / 0",
    "settings.py": b"STUDY = {'model': {'path': 'm'}, 'search': {'num_trials': 0}}\ndef space(trial): return {}",
    "section.py": b"STUDY = {'model': {'path': 'm'}, 'serach': {}}\ndef space(trial): return {}",
    "contradicts.py": b"STUDY = {'model': {'path': 'm'}}\ndef space(trial):\n    return {'schedule': 'linear', "
                      b"'num_rounds': 2, 'initial_sparsity': trial.suggest_float('s', 0.9, 0.9), 'target_sparsity': 0.5}",
    "list.py": b"STUDY = []\ndef space(trial): return {}",
    "unmeasured.py": b"STUDY = {'model': {'path': 'm'}, 'search': {'constraints': {'lambada/acc': 0.5}}}\n"
                     b"def space(trial): return {}",
    "trials.jsonl": b'{"target_sparsity": 2}', "no_trials.jsonl": b"\n",
}
PRUNE = ("prune", "MODEL", "--out", "out", "--context-tokens", "64", "--batch-tokens", "256", "--sparsity", "0.5")
EVALUATE = ("evaluate", "MODEL", "--limit", "2", "--tasks")
SWEEP = ("sweep", "search_spaces.demo", "--out", "out")
BAD = [
    # a corpus
    ((*PRUNE, "--corpus", "given/utf16.jsonl"), "given/utf16.jsonl, line 1: "),
    ((*PRUNE, "--corpus", "given/latin.txt"), "given/latin.txt, line 1: must be UTF-8 text, or UTF-16"),
    ((*PRUNE, "--corpus", "given/list.jsonl"), "every row needs a field `text` with a string or null, got a list in it"),
    ((*PRUNE, "--corpus", "given/field.jsonl"), "got the fields story; name the field that holds the text with --text-field"),
    ((*PRUNE, "--corpus", "given/field.jsonl", "--text-field", "tale"), "needs a field `tale`"),
    ((*PRUNE, "--corpus", "given/torn.jsonl.gz"), "cannot be read"),
    ((*PRUNE, "--corpus", "given/blank.txt"), "holds no text"),
    ((*PRUNE, "--corpus", "given/short.txt"), "at least 3 different passages"),
    ((*PRUNE, "--corpus", "given/a.pdf"), "a file must end in .txt"),
    ((*PRUNE, "--corpus", "given/*.md"), "no file that ends in"),
    ((*PRUNE, "--corpus", "./nowhere"), "no such file or folder"),
    ((*PRUNE, "--corpus", ""), "no such file or folder"),
    ((*PRUNE, "--corpus", "given/rows"), "no such file or folder"),
    ((*PRUNE, "--corpus", "http://host/text.txt"), "no such file or folder"),
    ((*PRUNE, "--corpus", "given/half.json"), "given/half.json, row 2: every row needs a field `text`"),
    ((*EVALUATE, "lambada", "--data-dir", "given/data", "--corpus", "typo.jsonl"), "corpus 'typo.jsonl': no such file"),
    ((*PRUNE, "--corpus", "no-owner/no-data-of-raysearch"), "neither a file or folder here nor a Hugging Face dataset"),
    # tasks
    ((*EVALUATE, "hellaswag", "--data-dir", "given/data"), "line 1: field 'endings' must be a list of two texts or more, none"),
    ((*EVALUATE, "lambada, hellaswag", "--data-dir", "given/data"), "line 1: field 'text' must be a text of two words"),
    ((*EVALUATE, "storycloze", "--data-dir", "given/data"), "line 2: field 'InputSentence1' is missing; the fields are a, b"),
    ((*EVALUATE, "nq_open", "--data-dir", "given/data"), "validation.jsonl, line 1: must be UTF-8 text"),
    ((*EVALUATE, "triviaqa", "--data-dir", "given/data"), "needs the file given/data/triviaqa/validation.jsonl"),
    ((*EVALUATE, " , "), "--tasks must be names with commas between them, got ' , '"),
    ((*EVALUATE, "last_wrd"), "task 'last_wrd' is not known; the nearest names are last_word"),
    ((*EVALUATE, "text", "--corpus", "given/blank.txt"), "holds no text"),
    ((*EVALUATE, "text", "--samples", "nowhere/x.jsonl"), "--samples must be a file in a folder that exists and can be"),
    ((*EVALUATE, "text", "--samples", "given"), "--samples must be a file"),
    ((*EVALUATE, "text", "--backend", "fast"), "backend must be auto or dense, got 'fast'"),
    ((*EVALUATE, "text", "--num-fewshot", "999"), "num_fewshot must be below"),
    ((*PRUNE, "--tasks", "lambada"), "task 'lambada'"),
    ((*PRUNE, "--tasks", "text"), "tasks text are made from the corpus's held-out documents, but corpus is None"),
    # a model
    (("evaluate", "nowhere", "--tasks", "text"), "model nowhere: no such folder"),
    (("evaluate", "given", "--tasks", "text"), "given"),
    (("prune", "given/file", "--out", "out", "--sparsity", "0.5"), "given/file"),
    (("kernels", "nowhere"), "nowhere"),
    (("kernels", "MODEL", "--tokens", "0"), "--tokens must be whole numbers of 1 or more"),
    (("kernels", "MODEL", "--tokens", ","), "--tokens must be names with commas"),
    # settings
    ((*PRUNE, "--context-tokens", "65"), "context_tokens"),
    ((*PRUNE, "--batch-tokens", "100"), "batch_tokens must be a multiple of context_tokens"),
    ((*PRUNE, "--zero-stage", "7"), "zero_stage"),
    ((*PRUNE, "--criterion", "luck"), "criterion"),
    ((*PRUNE, "--pattern", "stripes"), "pattern"),
    ((*PRUNE, "--eval-items", "0"), "num_items"),
    ((*PRUNE, "--learning-rate", "0"), "learning_rate"),
    ((*PRUNE, "--seed", "-1"), "data.seed: Input should be greater than or equal to 0 (got -1)"),
    # spaces
    (("sweep", "given.no_space", "--out", "out"), "must define STUDY (a dict of settings) and space(trial)"),
    (("sweep", "given.syntax", "--out", "out"), "given/syntax.py, line 1: SyntaxError"),
    (("sweep", "given.raises", "--out", "out"), "given/raises.py, line 1: ZeroDivisionError: division by zero"),
    (("sweep", "given.settings", "--out", "out"), "search.num_trials: Input should be greater than or equal to 1 (got 0)"),
    (("sweep", "given.section", "--out", "out"), "serach: no such field; the fields are model, data"),
    (("plan", "given.list"), "must define STUDY"),
    (("plan", "given.null"), "given.null: cannot be imported: SyntaxError: source code string cannot contain null bytes"),
    (("plan", "given/list.py"), "search space given/list.py: cannot be imported"),
    (("plan", ""), "search space : cannot be imported"),
    (("space",), "space takes a module to show, or --new NAME to write one, got neither"),
    (("space", "given.raises", "--new", "a"), "got given.raises and --new a; give one of them"),
    (("space", "given.no_space"), "must define STUDY (a dict of settings) and space(trial)"),
    (("space", "given.contradicts"), "target_sparsity must be at least initial_sparsity (0.9), got 0.5"),
    (("space", "given.unmeasured"), "constraints must be of sizes (num_nonzero, "),
    (("sweep", "given.unmeasured", "--out", "out"), "got 'lambada/acc'; change it in STUDY, or add its task"),
    (("space", "--new", "a b"), "--new must be the name of a Python module"),
    (("space", "--new", "given.raises"), "exists already; give another name"),
    # a sweep
    ((*SWEEP, "--keep", "some"), "--keep must be frontier, all or none, got 'some'"),
    ((*SWEEP, "--time-budget", "-3m"), "--time-budget must be a positive time"),
    ((*SWEEP, "--trials-from", "given/trials.jsonl"), "line 1: target_sparsity: Input should be less than 1"),
    ((*SWEEP, "--trials-from", "given/no_trials.jsonl"), "holds no trial"),
    ((*SWEEP, "--trials-from", "given"), "given: cannot be read (Is a directory)"),
    (("sweep", "search_spaces.demo", "--out", "s3://user:secret@bucket/x"), "a URI must hold no credentials"),
    (("sweep", "search_spaces.demo", "--out", "ftp://host/x"), "pyarrow cannot open it"),
    # a study
    (("results", "given"), "holds no study (study.json is missing)"),
    (("results", "given/file"), "no such study directory"),
    (("report", "nowhere"), "no such study directory"),
    (("status", "given"), "holds no study"),
    (("pick", "given", "--max-bytes", "1GB"), "holds no study"),
    (("pick", "given", "--max-bytes", "much"), "a size must be a number of bytes such as 1200000, 300MB or 1.2GB"),
    (("pick", "given", "--max-drop", "text"), "max-drop"),
    (("export", "nowhere.json", "--out", "out"), "nowhere.json"),
    (("export", "given/empty.json", "--out", "out"), "not a pick of this version of raysearch"),
    # pretraining, benchmarks
    (("pretrain", "--preset", "huge", "--out", "out"), "preset must be one of tiny"),
    (("pretrain", "--steps", "0", "--out", "out"), "steps must be at least 1, got 0"),
    (("pretrain", "--num-workers", "3", "--out", "out"), "num_workers must divide the 4 sequences of a batch, got 3"),
    (("pretrain", "--corpus", "given/latin.txt", "--out", "out"), "given/latin.txt, line 1"),
    (("pretrain", "--out", "given/file"), "is a file; give a directory with --out"),
    (("pretrain", "--out", "given"), "holds something else"),
    (("pretrain", "--corpus", "typo.txt", "--out", "out"), "corpus 'typo.txt': no such file"),
    (("bench-kernels", "--out", "nowhere/x.json", "--cases", "cpu"), "--out must be a file in a folder that exists"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(run: Run, tiny_model: Path, tmp_path: Path,
                                                             arguments: tuple[str, ...], sentence: str) -> None:
    for name, content in GIVEN.items():
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "given" / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*(str(tiny_model) if each == "MODEL" else each for each in arguments))
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("raysearch: ")
    assert sentence in err, err
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and "__pycache__" not in path.parts] == []
