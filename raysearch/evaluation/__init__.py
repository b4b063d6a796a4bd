"""Evaluation: lm-eval's tasks and metrics, scored by our own fast `Scorer`. What it offers is imported at its first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from raysearch.evaluation.evaluating import Evaluation, Race, evaluate, forward_sizes, metric_names, tasks_fingerprint
    from raysearch.evaluation.scorer import Scorer
    from raysearch.evaluation.tasks import describe_tasks, heldout_tasks, load_tasks

__all__ = ["Evaluation", "Race", "Scorer", "Task", "describe_tasks", "evaluate", "forward_sizes", "heldout_tasks",
           "load_tasks", "metric_names", "tasks_fingerprint"]
_HOMES = {"Task": "lm_eval.api.task", "Scorer": "raysearch.evaluation.scorer",
          **dict.fromkeys(("describe_tasks", "heldout_tasks", "load_tasks"), "raysearch.evaluation.tasks")}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(_HOMES.get(name, "raysearch.evaluation.evaluating")), name)
