"""What may be mistyped, checked before the imports that take seconds."""

from collections.abc import Sequence

from raysearch.evaluation.tasks import check_task
from raysearch.models.checkpoint import model_folder


def check_names(model: str, tasks: Sequence[str]) -> None:
    """ValueError of one sentence for a model or a task that there is not."""
    model_folder(model)
    for task in tasks:
        check_task(task)
