"""A user's own tasks: YAML files in lm-eval's form, with data of their own."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from raysearch.study.text import first_line

if TYPE_CHECKING:
    from lm_eval.api.task import Task


def is_own(name: str) -> bool:
    """Whether a task is a path: it ends in .yaml, or has a slash, as ./tasks."""
    return name.endswith(".yaml") or "/" in name


def check_own(name: str) -> None:
    if not Path(name).exists():
        raise ValueError(f"task {name!r}: no such file or folder of YAML tasks in lm-eval's form")


def own_tasks(name: str) -> "list[Task]":
    """Those of a file, or of all files in a folder; data files that they name are looked for in that folder.

    They keep, as `written`, what stands in the folder's .yaml and .py files, for a fingerprint: prompts are nowhere else.
    ValueError of one sentence for what lm-eval cannot load."""
    import lm_eval.tasks

    check_own(name)
    path = Path(name).resolve()
    folder = path if path.is_dir() else path.parent
    try:
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        names = [each for each in manager.all_subtasks if path.is_dir() or manager.task_index[each].yaml_path == path]
        with contextlib.chdir(folder):
            tasks = [manager.load([each])["tasks"][each] for each in names]
    except Exception as error:  # whatever lm-eval, Jinja2, PyYAML and datasets make of a user's files
        raise ValueError(f"task {name!r}: lm-eval cannot load it ({first_line(error)})") from error
    if not tasks:
        raise ValueError(f"task {name!r}: holds no task in lm-eval's form, which has the fields task, dataset_path and "
                         "doc_to_text")
    written = [file.read_text() for file in sorted(folder.glob("*")) if file.suffix in (".yaml", ".py")]
    for task in tasks:
        task.written = written
    return tasks
