"""A study's results on a laptop: load, frontier, pick, tables, plots, page. No torch, ray or optuna needed."""
