"""raysearch: distributed search over pruning schedules for GPT language models."""

__version__ = "0.1.0"
