"""Evaluation: lm-eval's tasks and metrics, scored by our own fast `Scorer`."""

from lm_eval.api.task import Task

from raysearch.evaluation.evaluating import Evaluation, Race, evaluate, forward_sizes, metric_names, tasks_fingerprint
from raysearch.evaluation.scorer import Scorer
from raysearch.evaluation.tasks import describe_tasks, heldout_tasks, load_tasks

__all__ = ["Evaluation", "Race", "Scorer", "Task", "describe_tasks", "evaluate", "forward_sizes", "heldout_tasks",
           "load_tasks", "metric_names", "tasks_fingerprint"]
