"""raysearch: distributed search over pruning schedules for GPT language models."""

from typing import Any

__version__ = "0.1.0"


def load(folder: Any, backend: str = "sparse") -> Any:
    """The model of a folder that `raysearch export` wrote, dense or compressed: a transformers model on the CPU. A
    compressed one runs from its kept weights on sparse kernels; with backend="dense" it is made dense."""
    from raysearch.deploy.load import load as load_export

    return load_export(folder, backend)
