import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "analysis" / "notebooks" / "pareto.ipynb"


def test_its_cells_run_on_a_study(study_directory: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAYSEARCH_STUDY", str(study_directory))
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]
             if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    assert "9 on the frontier, hypervolume 0.597" in capsys.readouterr().out
    assert (names["picked"].trial, names["picked"].round) == (2, 1)
    assert len(names["figure"].data) > 0


def test_it_defines_no_functions() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)
