"""Documents that name parts of the code name parts that exist."""

import ast
import re
from pathlib import Path

import pytest
from test_boundaries import LAYERS

ROOT = Path(__file__).parent.parent
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
        "trial/candidate.py", "evaluation/__init__.py"]
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
            assert re.search(rf"^(def {name}\(|class {name}\b|[\w, ]*\b{name}\b[\w, ]* = )", text, re.MULTILINE), (path, name)


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
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 26))
    defined = {name for path in (ROOT / "tests").rglob("test_*.py")
               for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    for row in rows:
        named = set(re.findall(r"`(test_\w+)`", row))
        assert named <= defined, named - defined
        assert named or "does not exist here" in row, row
