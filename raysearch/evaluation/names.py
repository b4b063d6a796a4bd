"""What may be mistyped, checked before the imports that take seconds."""

from collections.abc import Sequence

from raysearch.config import SIZES, Study
from raysearch.evaluation.own_tasks import is_own
from raysearch.evaluation.tasks import FILE_TASKS, HELDOUT_CONFIGS, TOKEN_PERPLEXITY, check_task
from raysearch.models.checkpoint import model_folder
from raysearch.training.corpus import check_corpus


def check_names(model: str, tasks: Sequence[str], corpus: str | None, field: str) -> None:
    """ValueError of one sentence for a model, a task, a corpus or its field that there is not."""
    model_folder(model)
    for task in tasks:
        check_task(task)
    if corpus is not None:
        check_corpus(corpus, field)


def check_measured(study: Study, metrics: Sequence[str] | None = None) -> None:
    """ValueError of one sentence unless each objective, and each constraint, is of a size or a metric of the study's tasks.
    `metrics`: theirs, where they were loaded; before that, those of tasks that lm-eval alone knows are believed."""
    is_open = False
    if metrics is None:
        folder, by_task = study.evaluation.data_dir, {}
        for task in study.evaluation.tasks:
            if not is_own(task):
                check_task(task)
            if (known := known_metrics(task, folder is not None)) is not None:
                by_task[task] = known
        is_open, metrics = len(by_task) < len(study.evaluation.tasks), [each for known in by_task.values() for each in known]
    for setting in ("objectives", "constraints", "max_drop"):
        for name in getattr(study.search, setting):
            if name not in (*SIZES, *metrics) and not (is_open and name.rpartition("/")[0] not in by_task):
                raise ValueError(f"{setting} must be of sizes ({', '.join(SIZES)}) and metrics "
                                 f"({', '.join(metrics) or 'there is no task'}), got {name!r}; change it in STUDY, or add "
                                 "its task")


def known_metrics(name: str, has_files: bool) -> list[str] | None:
    """A task's metrics, as "task/metric", without lm-eval; None where only lm-eval knows them."""
    if name in HELDOUT_CONFIGS:
        config = HELDOUT_CONFIGS[name][1]
    elif name in FILE_TASKS and has_files:
        config = FILE_TASKS[name].config
    else:
        return None
    added = [TOKEN_PERPLEXITY] * (config["output_type"] == "loglikelihood_rolling")
    return [f"{name}/{metric}" for metric in [*(each["metric"] for each in config["metric_list"]), *added]]
