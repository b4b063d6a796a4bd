"""Sums and masks of units on a real engine, against loops over what belongs to each head. That they are equal for every stage
and world size is held by test_pruner.py, which has the ranks."""

import pytest
import torch

from raysearch.config import Action
from raysearch.models.architectures import layout
from raysearch.pruning.patterns import heads
from raysearch.trial.pruner import Pruner
from raysearch.trial.round import dense_round, load_candidate
from raysearch.trial.units import UnitMap
from raysearch.trial.worker import Worker


def test_sums_and_masks_are_those_of_whole_heads(worker: Worker) -> None:
    load_candidate(worker, dense_round(worker))
    engine = worker.engine
    units = UnitMap(engine, heads(layout(engine.model, engine.prunables)))
    sizes, alive = units.sizes, units.eligible(lambda shard: shard.values != 0)
    sums = units.sums(lambda shard: shard.values)
    width = engine.model.config.n_embd // 2
    for unit in range(4):
        layer, head = divmod(unit, 2)
        fused = engine.gather(f"transformer.h.{layer}.attn.c_attn.weight").view(-1, 3, 2, width)[:, :, head]
        output = engine.gather(f"transformer.h.{layer}.attn.c_proj.weight").view(2, width, -1)[head]
        assert sizes[unit] == fused.numel() + output.numel()
        assert alive[unit]
        assert sums[unit].item() == pytest.approx(sum(fused.flatten().tolist()) + sum(output.flatten().tolist()), abs=1e-5)
    scores = torch.tensor([4.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    for scope, uniform, sparsity, gone in (("global", False, 0.5, {1, 2}), ("layer", False, 0.5, {1, 2}),
                                           ("global", False, 0.99, {1, 2, 3}), ("layer", True, 0.99, {1, 2})):
        masks = units.masks(Action(scope=scope, uniform=uniform), sparsity, scores, alive, engine.masks())
        for shard, mask in zip(engine.shards, masks):
            if shard.name.endswith("attn.c_proj.weight"):
                layer = int(shard.name.split(".")[2])
                kept = mask.view(2, -1)
                for head in range(2):
                    stays = 2 * layer + head not in gone
                    assert kept[head].all() if stays else not kept[head].any(), (scope, layer, head)


def test_neurons_of_the_smallest_norm_go_with_their_biases(worker: Worker) -> None:
    """By hand: each neuron's norm in a loop; what goes is no neuron's weight but its own."""
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    engine, norms = worker.engine, {}
    before = {name: engine.gather(name).clone() for name in engine.shapes}
    for layer in range(2):
        first, last = (before[f"transformer.h.{layer}.mlp.{name}.weight"] for name in ("c_fc", "c_proj"))
        for neuron in range(first.shape[1]):
            norms[layer, neuron] = float(first[:, neuron].square().sum() + last[neuron].square().sum())
    gone = sorted(norms, key=norms.__getitem__)[:len(norms) // 4]
    Pruner(engine, Action(criterion="l2", pattern="neuron", sparsity=0.25), 0).begin()
    wanted = {name: weights.clone() for name, weights in before.items()}
    for layer, neuron in gone:
        wanted[f"transformer.h.{layer}.mlp.c_fc.weight"][:, neuron] = 0
        wanted[f"transformer.h.{layer}.mlp.c_fc.bias"][neuron] = 0
        wanted[f"transformer.h.{layer}.mlp.c_proj.weight"][neuron] = 0
    for name, weights in wanted.items():
        assert torch.equal(engine.gather(name), weights), name
    assert {layer for layer, _ in gone} == {0, 1}
