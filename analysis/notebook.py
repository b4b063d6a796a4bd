"""Notebooks that are bound to a study: copies of those in notebooks/, whose cells only call this package."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from raysearch.study.files import new_file
from raysearch.study.ledger import Ledger


def write_notebook(directories: Sequence[str], out: Path | None = None) -> Path:
    """Of one study the report, of several their comparison; at `out`, or in the current folder under its own name, and bound by
    the cell that is tagged "parameters". ValueError for a directory without a study, or a file that is there already."""
    name = "pareto_report.ipynb" if len(directories) == 1 else "compare_studies.ipynb"
    notebook = json.loads((files("analysis") / "notebooks" / name).read_text())
    places = [str(Ledger.open(directory).directory) for directory in directories]
    path = out or Path(name)
    if path.exists():
        raise ValueError(f"{path}: is there already, and may hold work; name another file with --out")
    (parameters,) = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", ())]  # as papermill's
    values = {"STUDY": places[0], "STUDIES": places}
    parameters["source"] = [f"{line.split(' = ')[0]} = {values[line.split(' = ')[0]]!r}\n" if line.split(" = ")[0] in values
                            else line for line in parameters["source"]]
    with new_file(path.absolute()) as file:
        file.write_text(json.dumps(notebook, indent=1) + "\n")
    return path
