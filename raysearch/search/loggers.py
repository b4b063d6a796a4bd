"""Other places that a sweep logs to: MLflow and Weights & Biases."""

import importlib
import importlib.util

from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.air.integrations.wandb import WandbLoggerCallback


def logger_callbacks(name: str, mlflow_uri: str | None, wandb_project: str | None) -> list[tune.Callback]:
    """Ray's own loggers beside TensorBoard's, which Tune always writes; ValueError where a package is missing."""
    asked = {"mlflow": mlflow_uri, "wandb": wandb_project}
    for package, value in asked.items():
        if value is not None and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{package} needs the package {package}, which is not installed here: pip install {package}")
    loggers: list[tune.Callback] = []
    if mlflow_uri is not None:
        loggers.append(MLflowLoggerCallback(tracking_uri=mlflow_uri, experiment_name=name))
    if wandb_project is not None:
        loggers.append(WandbLoggerCallback(project=wandb_project, group=name))
    return loggers
