"""Models: load them, know their parts, store their weights, cut them and make them sparse."""
