"""The tests mirror the tree: every module has its twin, and every test file is a twin, a suite or a whole sweep.

The twin of raysearch/study/ledger.py is tests/study/test_ledger.py; where two modules have one name, which pytest refuses
for tests, one twin takes its folder's name too (tests/deploy/test_deploy_load.py). The twin of a package's own code, in
__init__.py, has the name of the package (tests/evaluation/test_evaluation.py).
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITHOUT = {
    "raysearch/__init__.py": "its load is that of raysearch/deploy/load.py",
    "raysearch/__main__.py": "three lines, which every test that starts a sweep runs",
    "raysearch/demo.py": "is a whole study of minutes: CI runs `make demo`",
}
"""Modules without a twin, and why."""
SUITES = {
    "test_boundaries.py": "who may import whom",
    "test_cluster_files.py": "the YAML files for clusters",
    "test_docs.py": "what the documents say",
    "test_twins.py": "this file",
    "search/test_search_benchmark.py": "benchmarks/search",
    "evaluation/test_gpu.py": "all of the scorer on a GPU",
}
"""Tests of what is no module of Python."""


def has_code(path: Path) -> bool:
    """Whether a module does more than import and say what it is; imports that __getattr__ delays are no more."""
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return path.name != "__init__.py" or any(node.name != "__getattr__" for node in body)


def modules(root: Path) -> list[Path]:
    return [path.relative_to(root) for folder in ("raysearch", "analysis") for path in sorted((root / folder).rglob("*.py"))
            if has_code(path)]


def twins(module: Path) -> set[Path]:
    """The names that a module's twin may have, below tests/."""
    folder = module.parent.relative_to("raysearch") if module.parts[0] == "raysearch" else module.parent
    name = folder.name if module.stem == "__init__" else module.stem
    return {folder / f"test_{name}.py", folder / f"test_{folder.name}_{name}.py"}


def files(root: Path) -> set[Path]:
    return {path.relative_to(root / "tests") for path in (root / "tests").rglob("test_*.py")}


def without_twin(root: Path) -> list[str]:
    there = files(root)
    return [module.as_posix() for module in modules(root) if not twins(module) & there]


def test_every_module_has_its_twin() -> None:
    assert set(without_twin(ROOT)) == set(WITHOUT)


def test_every_test_is_a_twin_a_suite_or_a_whole_sweep() -> None:
    known = {name for module in modules(ROOT) for name in twins(module)}
    strangers = {path.as_posix() for path in files(ROOT) - known if path.parts[0] != "end_to_end"}
    assert strangers == set(SUITES)


def test_names_are_unique() -> None:
    """pytest imports test files by their bare names."""
    assert not {name: count for name, count in Counter(path.name for path in files(ROOT)).items() if count > 1}


@pytest.mark.parametrize(("module", "twin", "missing"), [
    ("raysearch/study/ledger.py", "study/test_ledger.py", False),
    ("raysearch/study/ledger.py", "test_ledger.py", True),
    ("raysearch/cli.py", "test_cli.py", False),
    ("raysearch/deploy/load.py", "deploy/test_deploy_load.py", False),
    ("raysearch/evaluation/__init__.py", "evaluation/test_evaluation.py", False),
    ("raysearch/evaluation/__init__.py", "evaluation/test_tasks.py", True),
    ("analysis/pick.py", "analysis/test_pick.py", False),
    ("analysis/pick.py", "test_pick.py", True),
])
def test_a_missing_twin_is_found(module: str, twin: str, missing: bool, tmp_path: Path) -> None:
    for path in (tmp_path / module, tmp_path / "tests" / twin):
        path.parent.mkdir(parents=True)
        path.write_text("def f():\n    pass\n")
    assert without_twin(tmp_path) == [module] * missing
