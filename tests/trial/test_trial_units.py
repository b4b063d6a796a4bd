"""Sums and masks of units on a real engine, against loops over what belongs to each head. That they are equal for every stage
and world size is held by test_pruner.py, which has the ranks."""

import pytest
import torch

from raysearch.config import Action
from raysearch.models.architectures import layout
from raysearch.pruning.patterns import heads
from raysearch.trial.round import dense_round, load_candidate
from raysearch.trial.units import unit_counts, unit_masks, unit_sums
from raysearch.trial.worker import Worker


def test_sums_and_masks_are_those_of_whole_heads(worker: Worker) -> None:
    load_candidate(worker, dense_round(worker))
    engine = worker.engine
    units = heads(layout(engine.model, engine.prunables))
    sizes, alive = unit_counts(engine, units, lambda shard: shard.values != 0)
    sums = unit_sums(engine, units, sizes, lambda shard: shard.values)
    width = engine.model.config.n_embd // 2
    for unit in range(4):
        layer, head = divmod(unit, 2)
        fused = engine.gather(f"transformer.h.{layer}.attn.c_attn.weight").view(-1, 3, 2, width)[:, :, head]
        output = engine.gather(f"transformer.h.{layer}.attn.c_proj.weight").view(2, width, -1)[head]
        assert sizes[unit] == fused.numel() + output.numel()
        assert alive[unit]
        assert sums[unit].item() == pytest.approx(sum(fused.flatten().tolist()) + sum(output.flatten().tolist()), abs=1e-5)
    scores = torch.tensor([4.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    for scope, sparsity, gone in (("global", 0.5, {1, 2}), ("layer", 0.5, {1, 2}), ("global", 0.99, {1, 2, 3})):
        masks = unit_masks(engine, units, Action(scope=scope), sparsity, scores, sizes, alive, engine.masks())
        for shard, mask in zip(engine.shards, masks):
            if shard.name.endswith("attn.c_proj.weight"):
                layer = int(shard.name.split(".")[2])
                kept = mask.view(2, -1)
                for head in range(2):
                    stays = 2 * layer + head not in gone
                    assert kept[head].all() if stays else not kept[head].any(), (scope, layer, head)
