"""A study's results on a laptop: load, frontier, pick, tables, plots, page. No torch, ray or optuna needed."""

from analysis.load import load as load_study

__all__ = ["load_study"]
