"""Who may import whom (CONTRIBUTING.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOORS = {
    "deepspeed": {"raysearch/engine.py"},
    "optuna": {"raysearch/search.py"},
    "lm_eval": {"raysearch/evaluation"},
    "ray": {"raysearch/search.py", "raysearch/cluster.py", "raysearch/trial.py", "raysearch/pretrain.py",
            "raysearch/doctor.py"},
    "pandas": {"analysis"},
    "plotly": {"analysis"},
    "datasets": {"raysearch/data.py", "raysearch/evaluation"},
}
LAYERS = ["config storage", "lease", "ledger", "pruning placement model data weights provenance kernels",
          "engine evaluation", "bench export", "round", "trial prune evaluate pretrain cluster", "search",
          "demo plan status doctor", "cli __main__"]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources() -> list[Path]:
    return [p for folder in ("raysearch", "analysis") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("package", DOORS)
def test_each_heavy_dependency_has_its_door(package: str) -> None:
    for path in sources():
        where = path.relative_to(ROOT).as_posix()
        if any(name.partition(".")[0] == package for name in imports(path)):
            assert any(where.startswith(door) for door in DOORS[package]), f"{where} imports {package}"


def test_imports_go_down_the_layers() -> None:
    for path in sorted((ROOT / "raysearch").rglob("*.py")):
        own = path.relative_to(ROOT / "raysearch").parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "raysearch" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != own and own in LEVEL:
                assert LEVEL[parts[1]] <= LEVEL[own], f"{path.name} imports {name}"


def test_pruning_is_pure() -> None:
    for path in (ROOT / "raysearch" / "pruning").glob("*.py"):
        heavy = {name for name in imports(path) if name.partition(".")[0] in {*DOORS, "transformers", "pydantic"}}
        assert not heavy
        assert not {n for n in imports(path) if n.startswith("raysearch") and not n.startswith("raysearch.pruning")}


def test_analysis_opens_without_torch() -> None:
    code = ("import sys, analysis.report, analysis.pick, analysis.tables\n"
            "print([m for m in ('torch', 'ray', 'optuna', 'deepspeed', 'transformers') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys, raysearch.cli\n"
            "print([m for m in ('torch', 'ray', 'optuna', 'pandas', 'transformers') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
