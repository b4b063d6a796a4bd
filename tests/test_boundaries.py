"""Who may import whom. LAYERS is the one list of the house's floors; the documentation quotes it from here."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (  # from top to bottom; a module imports from its own floor and from those below
    "cli decide terminal __main__",
    "demo add plan status evaluate finish replicate prune measure",
    "search",
    "deploy",
    "trial",
    "evaluation",
    "training",
    "cluster",
    "models",
    "kernels",
    "study",
    "pruning",
    "config frozen units",
)
FLOOR = {room: -floor for floor, rooms in enumerate(LAYERS) for room in rooms.split()}
COMMANDS = {*LAYERS[0].split(), *LAYERS[1].split()}
DOORS = {  # heavy dependency -> the only places that import it
    "deepspeed": {"raysearch/training/zero.py"},
    "optuna": {"raysearch/search/"},
    "ray": {"raysearch/search/", "raysearch/trial/gang.py", "raysearch/trial/watchdog.py", "raysearch/cluster/",
            "raysearch/training/pretrain.py", "raysearch/training/pretrain_worker.py"},
    "lm_eval": {"raysearch/evaluation/"},
    "transformers": {"raysearch/models/", "raysearch/evaluation/", "raysearch/training/", "raysearch/deploy/"},
    "datasets": {"raysearch/training/corpus.py", "raysearch/evaluation/"},
    "triton": {"raysearch/kernels/"},
    "pandas": {"analysis/"},
    "plotly": {"analysis/"},
}
LIGHT = {  # what may stand in the rooms that open on any laptop
    "config.py": {"pydantic"},
    "frozen.py": {"pydantic"},
    "units.py": set(),
    "study/": {"numpy", "pydantic", "pyarrow"},
    "pruning/pareto.py": {"numpy"},
    "pruning/schedules.py": set(),
    "pruning/": {"numpy", "torch"},
}


def imports(path: Path, source: str | None = None) -> set[str]:
    """Names of the modules and members that a file imports anywhere, absolute ones."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources() -> list[Path]:
    return [path for folder in ("raysearch", "analysis") for path in sorted((ROOT / folder).rglob("*.py"))]


def turned_arrows(paths: Iterable[Path]) -> Iterator[str]:
    """Imports of raysearch that go up, and those of analysis from below the commands."""
    for path in paths:
        room = path.relative_to(ROOT / "raysearch").parts[0].removesuffix(".py")
        for name in imports(path):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top == "analysis" and room not in COMMANDS:
                yield f"{path.relative_to(ROOT)} imports {name}"
            if top == "raysearch" and target in FLOOR and FLOOR[target] > FLOOR.get(room, 1):
                yield f"{path.relative_to(ROOT)} imports {name}"


def test_imports_go_down_the_house() -> None:
    paths = sorted((ROOT / "raysearch").rglob("*.py"))
    rooms = {path.relative_to(ROOT / "raysearch").parts[0].removesuffix(".py") for path in paths} - {"__init__"}
    assert rooms == set(FLOOR), "every room stands on one floor of LAYERS"
    assert not list(turned_arrows(paths))


@pytest.mark.parametrize(("place", "line"), [
    ("pruning/selection.py", "from raysearch.trial.round import run_round"),
    ("study/ledger.py", "from raysearch.kernels import compress"),
    ("kernels/weight.py", "from raysearch.models.model import load_model"),
    ("trial/round.py", "from analysis.load import load"),
    ("search/sampler.py", "def f():\n    import raysearch.plan"),
])
def test_one_turned_arrow_is_found(place: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "raysearch" / place
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(list(turned_arrows([path]))) >= 1


@pytest.mark.parametrize("package", DOORS)
def test_each_heavy_dependency_has_its_doors(package: str) -> None:
    users = {path.relative_to(ROOT).as_posix() for path in sources()
             if any(name.partition(".")[0] == package for name in imports(path))}
    strangers = [user for user in users if not any(user.startswith(door) for door in DOORS[package])]
    unused = [door for door in DOORS[package] if not any(user.startswith(door) for user in users)]
    assert (strangers, unused) == ([], [])


def test_the_lower_rooms_are_light() -> None:
    for path in sorted((ROOT / "raysearch").rglob("*.py")):
        place = path.relative_to(ROOT / "raysearch").as_posix()
        allowed = next((names for start, names in LIGHT.items() if place.startswith(start)), None)
        if allowed is not None:
            foreign = {name.partition(".")[0] for name in imports(path)} - {"raysearch", *sys.stdlib_module_names}
            assert foreign <= allowed, place


def called_modules(path: Path) -> Iterator[str]:
    """Names from our own packages that a file calls, although they are modules: search.sweep is one, search.sweep.sweep not."""
    tree = ast.parse(path.read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("raysearch", "analysis"):
            for alias in node.names:
                if (alias.asname or alias.name) in called and is_module(node.module, alias.name):
                    yield f"{path.relative_to(ROOT)} calls the module {node.module}.{alias.name}"


def is_module(package: str, name: str) -> bool:
    """Whether `from package import name` gives a module; a function of that name in the package's __init__ goes first."""
    if not (ROOT / package.replace(".", "/") / f"{name}.py").is_file():
        return False
    importlib.import_module(f"{package}.{name}")  # which makes it an attribute of its package, unless that has one
    return isinstance(getattr(importlib.import_module(package), name), ModuleType)


@pytest.mark.parametrize("folder", ["raysearch", "analysis", "benchmarks", "search_spaces", "tests"])
def test_no_module_is_called(folder: str) -> None:
    assert not [line for path in sorted((ROOT / folder).rglob("*.py")) for line in called_modules(path)]


def test_analysis_stands_beside_the_house() -> None:
    for path in sorted((ROOT / "analysis").glob("*.py")):
        for name in imports(path):
            if name.startswith("raysearch."):
                allowed = ("study", "config", "frozen", "units")
                is_front = name.startswith("raysearch.pruning.pareto")
                assert is_front or name.split(".")[1] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("start", ["raysearch.cli", "analysis.page, analysis.pick, analysis.tables", "raysearch.study.ledger",
                                   "raysearch.pruning.pareto, raysearch.pruning.schedules", "raysearch.config"])
def test_what_opens_on_a_laptop_loads_nothing_heavy(start: str) -> None:
    heavy = ("torch", "ray", "optuna", "deepspeed", "transformers", *(() if start.startswith("analysis") else ("pandas",)))
    code = f"import sys, {start}\nprint([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
