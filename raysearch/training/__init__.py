"""Sharded training that keeps masks: the engine, the data, the loops."""
