"""What may be mistyped, checked before the imports that take seconds."""

from collections.abc import Sequence

from raysearch.evaluation.tasks import check_task
from raysearch.models.checkpoint import model_folder
from raysearch.training.corpus import check_corpus


def check_names(model: str, tasks: Sequence[str], corpus: str | None, field: str) -> None:
    """ValueError of one sentence for a model, a task, a corpus or its field that there is not."""
    model_folder(model)
    for task in tasks:
        check_task(task)
    if corpus is not None:
        check_corpus(corpus, field)
