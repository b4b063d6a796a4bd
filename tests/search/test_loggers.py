"""Other places that a sweep logs to."""

from pathlib import Path

import pytest

import raysearch.search.sweep
from raysearch.config import study_of
from raysearch.search.loggers import logger_callbacks


def test_missing_loggers_are_named() -> None:
    assert logger_callbacks("x", None, None) == []
    with pytest.raises(ValueError, match="--mlflow needs the package mlflow, which is not installed here: pip install mlflow"):
        logger_callbacks("x", "file:///tmp", None)
    with pytest.raises(ValueError, match="--wandb needs the package wandb"):
        logger_callbacks("x", None, "project")


def test_a_missing_logger_stops_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--wandb needs"):
        raysearch.search.sweep.sweep("s", tmp_path / "study", study_of(path="m"), dict, print, wandb_project="project")
    assert not list(tmp_path.iterdir())
