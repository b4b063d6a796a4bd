"""A study's results on a laptop: load, frontier, pick, tables, plots, report. No torch, ray or optuna needed."""
