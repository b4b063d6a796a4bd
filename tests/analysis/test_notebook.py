import ast
import json
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from synthetic_study import SyntheticStudy, twelve_trials

NOTEBOOKS = sorted((Path(__file__).parents[2] / "analysis" / "notebooks").glob("*.ipynb"))


def executed(notebook: Path) -> dict[str, Any]:
    """What its cells leave behind."""
    names: dict[str, Any] = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(notebook), "exec"), names)
    return names


def test_the_report_runs_on_the_study_that_it_is_bound_to(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    twelve_trials(tmp_path / "a study's")
    code, out, err = run("notebook", tmp_path / "a study's")
    assert (code, out) == (0, "pareto_report.ipynb\n"), err
    names = executed(tmp_path / "pareto_report.ipynb")
    assert "9 of 12 candidates scored on the report split are on the frontier" in capsys.readouterr().out
    assert (names["picked"].trial, names["picked"].round) == (3, 1)
    assert names["STUDY"] == str(tmp_path / "a study's")
    assert "is there already, and may hold work" in run("notebook", tmp_path / "a study's")[2]


def test_studies_are_compared(tmp_path: Path, study_directory: Path, run: Run) -> None:
    study = SyntheticStudy(tmp_path / "other", objectives=("num_nonzero", "last_word/acc"))
    study.dense()
    study.trial(0, [0.5], report=True)
    code, _, err = run("notebook", study_directory, tmp_path / "other", "--out", "x.ipynb")
    assert code == 0, err
    names = executed(tmp_path / "x.ipynb")
    assert list(names["frames"]) == [str(study_directory), str(tmp_path / "other")]
    assert "holds no study" in run("notebook", study_directory, tmp_path, "--out", "y.ipynb")[2]
    assert not (tmp_path / "y.ipynb").exists()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_only_call_the_package_and_hold_no_outputs(notebook: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    assert [cell["metadata"].get("tags") for cell in cells].count(["parameters"]) == 1
    for cell in cells:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)
