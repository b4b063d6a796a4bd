"""When masks move, and what is looked at for it. That they are the same for every stage and world size, and equal to plain
loops, is held by test_pruner.py, which has the ranks."""

import pytest
import torch

from raysearch.config import Action
from raysearch.trial.pruner import Pruner
from raysearch.trial.round import dense_round, load_candidate
from raysearch.trial.worker import Worker


@pytest.mark.parametrize("criterion", ["rigl", "set"])
def test_gradients_are_held_only_where_masks_move_after_them(worker: Worker, criterion: str) -> None:
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    engine, num_steps, moved, watched = worker.engine, 20, [], []
    engine.restart(0.0)
    action = Action(criterion=criterion, sparsity=0.5, mask_interval_steps=5, drop_fraction=0.5, seed=1)
    pruner = Pruner(engine, action, num_steps)
    pruner.begin()
    masks = {p.name: engine.gather_mask(p.name) for p in engine.prunables}
    kept = engine.kept_counts()
    for step in range(1, num_steps + 1):
        if engine.optimizer.gathered:
            watched.append(step)
        engine.train_step(torch.arange(64 * engine.sequences_per_rank).view(-1, 64) % 50, 1e-3)
        pruner.after_step(step)
        now = {p.name: engine.gather_mask(p.name) for p in engine.prunables}
        if any(not torch.equal(now[name], mask) for name, mask in masks.items()):
            moved.append(step)
        masks = now
    assert moved == [2, 7, 12]  # the path ends at 14, where nothing moves
    assert watched == (moved if criterion == "rigl" else [])
    assert engine.kept_counts() == kept
    pruner.end()
    assert sum(kept.values()) - sum(engine.kept_counts().values()) < 20  # what grew and stayed at 0 is gone
    engine.restart(0.0)
