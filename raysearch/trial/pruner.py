"""The pruner: which weights an action removes, as masks on this rank's shards."""

import math

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.kernels import selection_passes
from raysearch.pruning.criteria import moments, std_threshold
from raysearch.pruning.selection import keep_masks, num_to_prune, row_masks, threshold_masks
from raysearch.training.engine import Engine


def select(engine: Engine, action: Action) -> list[Tensor]:
    """Keep masks [n] for the engine's prunable shards, by the action's threshold, or by its sparsity and scope."""
    shards = engine.prunable_shards
    shards_of = {p.name: [shard for shard in shards if shard.name == p.name] for p in engine.prunables}
    if action.threshold is not None:
        cut = {name: action.threshold for name in shards_of}
        if action.threshold_unit == "std":
            for name, parts in shards_of.items():
                sums = engine.all_reduce(moments([part.values for part in parts]).to(engine.device))
                cut[name] = std_threshold(action.threshold, *sums.tolist())
        return threshold_masks([shard.values for shard in shards], [cut[shard.name] for shard in shards])
    assert action.sparsity is not None
    rank, world_size = engine.shard_rank
    passes = selection_passes(engine.device)
    if action.scope == "global":
        num_prune = num_to_prune(action.sparsity, sum(math.prod(p.shape) for p in engine.prunables))
        return keep_masks([shard.values for shard in shards], [shard.index for shard in shards], num_prune,
                          all_reduce=engine.all_reduce, rank=rank, world_size=world_size, passes=passes)
    keep: dict[str, Tensor] = {}
    for prunable in engine.prunables:
        parts = [shard.values for shard in shards_of[prunable.name]]
        if action.scope == "layer":
            num_prune = num_to_prune(action.sparsity, math.prod(prunable.shape))
            # a rank that holds nothing of this layer takes part with an empty shard: selection is collective
            (keep[prunable.name],) = keep_masks(parts or [torch.empty(0, device=engine.device)], [0], num_prune,
                                                all_reduce=engine.all_reduce, rank=rank, world_size=world_size, passes=passes)
        else:  # a row may lie on several ranks, so the whole matrix is gathered
            whole = engine.gather(prunable.name)
            rows = whole.T if prunable.transposed else whole  # [outputs, inputs]
            mask = row_masks(rows, num_to_prune(action.sparsity, rows.shape[1]))
            flat = (mask.T if prunable.transposed else mask).reshape(-1)
            for shard in shards_of[prunable.name]:
                keep[prunable.name] = flat[shard.start:shard.start + shard.values.numel()]
    return [keep[shard.name] for shard in shards]
