"""What may be mistyped, checked before the imports that take seconds."""

from collections.abc import Sequence
from pathlib import Path

from raysearch.evaluation.tasks import check_task
from raysearch.models.checkpoint import model_folder
from raysearch.training.data import corpus_files


def check_names(model: str, tasks: Sequence[str], data_dir: str | Path | None, corpus: str | None) -> None:
    """ValueError of one sentence for a model, task, data folder or corpus that there is not."""
    model_folder(model)
    for task in tasks:
        check_task(task, Path(data_dir) if data_dir else None)
    if corpus is not None:
        corpus_files(corpus)
