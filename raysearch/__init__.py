"""raysearch: distributed search over pruning schedules for GPT language models."""

from typing import Any

__version__ = "0.1.0"


def load(folder: Any) -> Any:
    """The model of a folder that `raysearch export` wrote, dense or compressed: a transformers model on the CPU."""
    from raysearch.export import load as load_export

    return load_export(folder)
