"""Documents name parts of the code that exist, and commands that run."""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from commands import Run
from synthetic_study import twelve_trials
from test_boundaries import LAYERS
from tiny_models import story
from transformers import PreTrainedTokenizerFast

from analysis.constraints import parse_constraints
from raysearch.cli import app
from raysearch.evaluation import describe_tasks
from raysearch.search.space import load_space
from raysearch.training.presets import PRESETS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(raysearch [a-z][^`]*)`")
COMMANDS = typer.main.get_command(app)
USAGE_ERROR = typer.BadParameter.__mro__[1]  # of click, or of the copy of click that newer versions of typer bring
HOW_IT_WORKS = ROOT / "docs" / "how_it_works.md"
MAX_PATH_LINES = 1500
"""Of what a newcomer reads first."""
COUNT_TOLERANCE = 0.2
"""A count in the document is to give an idea: it may be this far off before it must be written anew."""


def table_rows(document: Path, heading: str) -> list[list[str]]:
    """Cells of the first table below `## heading`, its header left out."""
    lines = document.read_text().split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def in_code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def num_lines(path: str, up_to: str | None) -> int:
    """Of a file, or of its part that ends with the function `up_to`."""
    text = (ROOT / path).read_text()
    if up_to is None:
        return len(text.splitlines())
    (end,) = [node.end_lineno for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == up_to]
    assert end is not None
    return end


def test_what_a_newcomer_reads_is_short_and_counted() -> None:
    rows = table_rows(HOW_IT_WORKS, "What to read first")
    files = [in_code(row[0]) for row in rows]
    assert [file[0].removeprefix("raysearch/") for file in files] == [
        "trial/round.py", "trial/pruner.py", "training/finetune.py", "training/optimizer.py", "training/engine.py",
        "trial/candidate.py", "evaluation/evaluating.py"]
    counted = [num_lines(path, up_to[0] if up_to else None) for path, *up_to in files]
    assert sum(counted) <= MAX_PATH_LINES
    written = [int(row[1]) for row in rows]
    for (path, *_), lines, number in zip(files, counted, written):
        assert number == pytest.approx(lines, rel=COUNT_TOLERANCE), f"{path} has {lines} lines; write that"
    assert f"{sum(written)} lines in all" in HOW_IT_WORKS.read_text()


def test_where_to_change_what_names_what_exists() -> None:
    for _, where, what, held_by in table_rows(HOW_IT_WORKS, "Where to change what"):
        (path,), (test,) = in_code(where), in_code(held_by)
        text = (ROOT / path).read_text()
        assert (ROOT / test).is_file(), test
        for name in in_code(what):
            defined = rf"^(def {name}\(|class {name}\b|[\w, ]*\b{name}\b[\w, ]*(: .*)? = )"
            assert re.search(defined, text, re.MULTILINE), (path, name)


@pytest.mark.parametrize("document", ["docs/how_it_works.md", "CONTRIBUTING.md"])
def test_the_list_of_layers_is_the_one_that_is_enforced(document: str) -> None:
    (quoted,) = re.findall(r"<!-- LAYERS -->\n```\n(.*?)\n```\n", (ROOT / document).read_text(), re.DOTALL)
    assert tuple(quoted.splitlines()) == LAYERS


def test_the_file_map_has_one_line_for_each_wing_and_command() -> None:
    (drawn,) = re.findall(r"## File map\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    named = re.findall(r"(?:^ *|; |, |: )([a-z_]+)(?:/|\.py)", drawn, re.MULTILINE)
    rooms = {room for floor in LAYERS for room in floor.split()} - {"__main__"}
    assert sorted(named) == sorted({*rooms, "raysearch", "analysis", "search_spaces", "benchmarks"})


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/how_it_works.md"])
def test_paths_and_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")}
    assert not [link for link in links if not ((ROOT / document).parent / link).exists()]
    paths = set(re.findall(r"\b(?:raysearch|analysis|tests|benchmarks|search_spaces)/[\w/]+\.\w+", text))
    written_by_a_user = {"search_spaces/mine.py"}
    assert not [path for path in paths - written_by_a_user if not (ROOT / path).exists()]


def test_every_fault_has_its_row_and_every_named_test_exists() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if re.match(r"\| \d", line)]
    assert len(rows) >= 25
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, len(rows) + 1))
    defined = {name for path in (ROOT / "tests").rglob("test_*.py")
               for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    for row in rows:
        named = set(re.findall(r"`(test_\w+)`", row))
        assert named <= defined, named - defined
        assert named or "does not exist here" in row, row


# ---- commands ----


def shell_commands(text: str) -> list[list[str]]:
    """The words of every command in the code blocks of a document, without comments."""
    lines = [line for block in CODE_BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def raysearch_arguments(words: list[str]) -> list[str] | None:
    """What a command line gives to raysearch, called by its name, as a module, or in a Ray job; None for other programs."""
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1:]
    if words[:3] == ["python", "-m", "raysearch"]:
        return words[3:]
    return words[1:] if words[0] == "raysearch" else None


def parsed(arguments: list[str]) -> typer.Context:
    """As the command line parses it, without running anything: UsageError for a command, an option or a value that is none."""
    command = COMMANDS.commands.get(arguments[0])
    assert command is not None, f"raysearch has no command {arguments[0]}"
    return command.make_context(arguments[0], arguments[1:])


def readme() -> list[list[str]]:
    """What README.md's code blocks give to raysearch."""
    every = [raysearch_arguments(words) for words in shell_commands((ROOT / "README.md").read_text())]
    return [arguments for arguments in every if arguments]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_code_blocks_are_parsed_by_the_command_line(document: Path) -> None:
    for words in shell_commands(document.read_text()):
        if (arguments := raysearch_arguments(words)) is not None:
            context = parsed(arguments)
            if context.info_name in ("plan", "sweep") and context.params["space"] != "search_spaces.mine":
                load_space(context.params["space"])
            if context.info_name == "pretrain":
                assert context.params["preset"] in PRESETS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_options_in_the_text_exist(document: Path) -> None:
    for line in INLINE.findall(document.read_text()):
        name, *others = shlex.split(line)[1:]
        assert name in COMMANDS.commands, line
        known = {option for parameter in COMMANDS.commands[name].params for option in parameter.opts}
        assert {word.partition("=")[0] for word in others if word.startswith("--")} <= known, line


@pytest.mark.parametrize(("line", "error"), [
    ("raysearch sweep search_spaces.demo --trails 40", "No such option"),
    ("raysearch sweep search_spaces.demo --trials many", "Invalid value for '--trials'"),
    ("raysearch pick", "Missing argument"),
    ("python -m raysearch export studies/mine/pick.json", "Missing option"),
    ("ray job submit --working-dir . -- python -m raysearch report a b", "unexpected extra argument"),
])
def test_a_command_that_is_none_is_found(line: str, error: str) -> None:
    (words,) = shell_commands(f"```bash\n{line}  # a comment\n```\n")
    with pytest.raises(USAGE_ERROR) as caught:
        parsed(raysearch_arguments(words) or [])
    assert error in caught.value.format_message()


def test_the_readme_shows_the_commands_that_matter() -> None:
    assert {arguments[0] for arguments in readme()} >= {
        "pretrain", "prune", "plan", "sweep", "results", "report", "pick", "export", "evaluate", "kernels"}
    known = {row["task"] for row in describe_tasks()}
    for arguments in readme():
        found = parsed(arguments).params
        if arguments[0] == "pick" and found["representatives"] is None:
            assert parse_constraints(found["max_bytes"], found["max_nonzero"], found["max_drop"] or (), found["min"] or (),
                                     found["max"] or ())
        if arguments[0] == "evaluate":
            assert set(found["tasks"].split(",")) <= known


def test_other_programs_of_the_readme_find_what_they_name() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in shell_commands((ROOT / "README.md").read_text()):
        if words[0] == "make":
            assert words[1] in targets
        if words[0] == "cp":
            assert (ROOT / words[1]).is_file()


def prepare(folder: Path, model: Path) -> None:
    """In `folder`, what README.md's commands expect or have made by then: models, a study, a deployment folder, data."""
    shutil.copytree(model, folder / "models" / "mine")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "models" / "mine")
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder / "models" / "mine")
    chats = [[{"role": "user", "content": f"Who ran to house {n}?"}, {"role": "assistant", "content": story(n)}]
             for n in range(60)]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in chats))
    twelve_trials(folder / "studies" / "mine")
    shutil.copytree(model, folder / "deploy")
    (folder / "data" / "lambada").mkdir(parents=True)
    (folder / "data" / "hellaswag").mkdir()
    passages = [json.dumps({"text": f"The dog of house {n} ran home to house {n}"}) for n in range(4)]
    (folder / "data" / "lambada" / "test.jsonl").write_text("\n".join(passages))
    questions = [json.dumps({"ctx": f"House {n} is", "endings": ["red.", "old.", "a dog.", "wet."], "label": n,
                             "activity_label": "Houses"}) for n in range(4)]
    (folder / "data" / "hellaswag" / "validation.jsonl").write_text("\n".join(questions))


HERE = ("prune", "results", "report", "notebook", "compare", "pick", "generate", "evaluate", "kernels", "space --new", "status")
"""Commands of README.md that run below, in seconds, on small things."""
ELSEWHERE = {  # how a command of a document begins -> the test that runs one like it, on something small
    "raysearch pretrain": "test_pretrain_learns_writes_a_hugging_face_folder_and_is_done_once",
    "raysearch space search_spaces": "test_every_space_of_ours_is_described",
    "raysearch plan": "test_the_command_measures_and_writes_nothing",
    "raysearch sweep": "test_killed_and_started_again_with_more_trials",
    "raysearch sweep search_spaces.gpt2_small --out s3": "test_a_sweep_and_all_that_reads_it",
    "raysearch export": "test_prune_with_fine_tuning_is_found_again",
    "raysearch add": "test_a_model_is_scored_as_the_studys_own",
    "raysearch replicate": "test_the_seeds_of_a_fork_are_run_once_and_leave_the_study_as_it_is",
    "raysearch finish": "test_a_finished_candidate_is_one_of_the_study",
    "raysearch verify": "test_the_command_verifies_a_folder_and_a_pick",
    "raysearch measure": "test_the_frontier_is_measured_once_and_shown",
    "raysearch doctor": "test_doctor_asks_every_node",
    "raysearch status s3": "test_a_sweep_and_all_that_reads_it",
    "ray job submit --working-dir . -- python -m raysearch doctor": "test_doctor_as_a_job_asks_every_node",
    "ray job submit --working-dir . -- python -m raysearch plan": "test_the_command_measures_and_writes_nothing",
    "ray job submit --working-dir . -- python -m raysearch sweep": "test_a_sweep_as_a_job",
    "ray get-auth-token": "test_a_sweep_as_a_job", "export RAY_AUTH_MODE=token": "test_a_sweep_as_a_job",
    "chmod 600": "test_a_token_that_others_can_read",
    "ray drain-node": "test_a_drained_node_is_left_after_the_round_without_a_charge",
    "make demo": "", "make test": "", "source": ""}
"""Empty: what sets this suite up, and what the suite is."""


def test_every_command_of_a_document_is_run_by_a_test() -> None:
    defined = {name for path in (ROOT / "tests").rglob("test_*.py")
               for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    assert {name for name in ELSEWHERE.values() if name} <= defined, set(ELSEWHERE.values()) - defined
    for document in DOCUMENTS:
        for words in shell_commands(document.read_text()):
            line = " ".join(words)
            is_here = document.name == "README.md" and line.startswith(tuple(f"raysearch {name}" for name in HERE))
            assert is_here or line.startswith(tuple(ELSEWHERE)), f"{document.name}: no test runs {line}; add one to ELSEWHERE"


@pytest.mark.parametrize("arguments", [each for each in readme() if " ".join(each).startswith(HERE)], ids=" ".join)
def test_the_readmes_commands_run(arguments: list[str], run: Run, tiny_model: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    prepare(tmp_path, tiny_model)
    code, out, err = run(*arguments)
    assert code == 0, err
    assert out.strip()


@pytest.mark.parametrize("name", sorted(COMMANDS.commands))
def test_every_command_has_help(name: str, run: Run) -> None:
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert (COMMANDS.commands[name].help or "").split(".")[0].split()[0] in out
