"""Whole matrices, one after the other: what is compared within them, what each layer gives up, and pruning block by block by
what flows into them."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.models.model import Prunable
from raysearch.pruning.budgets import erdos_renyi, num_to_prune, owl
from raysearch.pruning.criteria import CRITERIA, moments, squares, std_threshold, wanda
from raysearch.pruning.patterns import NOfM, n_of_m
from raysearch.pruning.selection import group_masks, refuse_nan, row_masks
from raysearch.training.calibration import Statistic, stream
from raysearch.training.data import Blocks
from raysearch.training.engine import Engine

LayerSparsities = Callable[[float], dict[str, float]]
"""sparsity of the model -> the share of each prunable matrix."""


def layer_sparsities(prunables: Sequence[Prunable], budget: str, sparsity: float) -> dict[str, float]:
    """The share of each prunable matrix by its shape; the experts in one parameter are one layer."""
    if budget == "uniform":
        return {p.name: sparsity for p in prunables}
    shapes, sizes = [(p.shape[-2], p.shape[-1]) for p in prunables], [math.prod(p.shape) for p in prunables]
    return dict(zip((p.name for p in prunables), erdos_renyi(shapes, sizes, sparsity), strict=True))


def budget_of(engine: Engine, action: Action, text: Blocks | None) -> LayerSparsities:
    """What each layer gives up, by the weights as they are as the round begins. Collective; owl, whose layers are the blocks,
    looks at text."""
    if action.budget != "owl":
        return functools.partial(layer_sparsities, engine.prunables, action.budget)
    outliers, sizes = _outliers(engine, action, text)

    def by_outliers(sparsity: float) -> dict[str, float]:
        of_block = owl(outliers, [sum(names.values()) for names in sizes], sparsity, action.owl_lambda)
        return {name: each for names, each in zip(sizes, of_block) for name in names}

    return by_outliers


@torch.no_grad()
def _outliers(engine: Engine, action: Action, text: Blocks | None) -> tuple[list[float], list[dict[str, int]]]:
    """Of each block: the share of its weights whose Wanda score is above `owl_m` times their mean; its matrices' sizes."""
    outliers, sizes, rows = [], [], {p.name: p.rows for p in engine.prunables}
    for sums in _streamed(engine, action, text, squares):
        scores = {name: wanda(rows[name](engine.gather(name)), engine.sum_over_ranks(total)) for name, total in sums.items()}
        sizes.append({name: score.numel() for name, score in scores.items()})
        num = sum(sizes[-1].values())
        cut = action.owl_m * sum(float(score.sum(dtype=torch.float64)) for score in scores.values()) / num
        outliers.append(sum(int((score > cut).sum()) for score in scores.values()) / num)
    return outliers, sizes


def _streamed(engine: Engine, action: Action, text: Blocks | None, statistic: Statistic) -> Iterator[dict[str, Tensor]]:
    """Calibration's stream of this rank's share of the action's sequences."""
    tokens, is_counted = shared_sequences(engine, action, text)
    return stream(engine.model, tokens, is_counted, [p.name for p in engine.prunables], statistic)


def shared_sequences(engine: Engine, action: Action, text: Blocks | None) -> tuple[Tensor, list[bool]]:
    """(int64 [n, T], which of them count): this rank's share of the action's sequences, as many on every rank."""
    assert text is not None, "the action was checked"
    number = action.calibration_sequences
    per_rank = -(-number // engine.world_size)
    first = engine.rank * per_rank
    tokens = text.stream(first, per_rank, action.seed).to(engine.device)
    return tokens, [first + sequence < number for sequence in range(per_rank)]


def matrix_mask(scores: Tensor, scope: str, group: NOfM | None, sparsity: float) -> Tensor:
    """Mask [O, K] of the scores of a matrix, or of a part of its inputs, that gives up `sparsity`: the highest of each group,
    of each row or of all stay. Ties go in row-major order. NaN is the caller's to refuse."""
    if group is not None:
        return group_masks(scores, *group)
    if scope == "row":
        return row_masks(scores, num_to_prune(sparsity, scores.shape[1]))
    return row_masks(scores.reshape(1, -1), num_to_prune(sparsity, scores.numel())).view(scores.shape)


@torch.no_grad()
def prune_block_by_block(engine: Engine, action: Action, text: Blocks | None, shares: LayerSparsities) -> None:
    """Each matrix by the inputs that it has behind the pruned blocks before it. Collective; the sequences are shared out."""
    criterion, group = CRITERIA[action.criterion], n_of_m(action.pattern)
    assert criterion.statistic is not None
    assert action.sparsity is not None
    of_layer, prunables = shares(action.sparsity), {p.name: p for p in engine.prunables}
    for sums in _streamed(engine, action, text, criterion.statistic):
        masks = engine.masks()
        for name, total in sums.items():
            prunable = prunables[name]
            masks_of = functools.partial(matrix_mask, scope=action.scope, group=group, sparsity=of_layer[name])
            weights, statistic = prunable.rows(engine.gather(name)), engine.sum_over_ranks(total)
            if criterion.solve is not None:
                weights, mask = criterion.solve(weights, statistic, masks_of, group.size if group else 0)
                refuse_nan([weights.isnan().any()])  # as they are where a score was
            else:
                assert criterion.scores is not None
                scores = criterion.scores(weights, statistic).masked_fill(weights == 0, -math.inf)
                mask = masks_of(scores)
                refuse_nan([scores.isnan().any()])
            for index, shard in enumerate(engine.shards):
                if shard.name == name:
                    here = slice(shard.start, shard.start + shard.values.numel())
                    shard.values.copy_(prunable.stored(weights)[here])
                    masks[index] = prunable.stored(mask)[here]
        engine.set_masks(masks)


def masks_by_row(engine: Engine, action: Action, group: NOfM | None, of_layer: Mapping[str, float], scores: Sequence[Tensor]
              ) -> list[Tensor]:
    """Of the prunable shards, each matrix gathered after the other: a row may lie on several ranks. Collective."""
    here = {shard.name: (shard, score) for shard, score in zip(engine.prunable_shards, scores)}
    parts: dict[str, Tensor] = {}
    has_nan = []
    for prunable in engine.prunables:
        whole = torch.zeros(math.prod(prunable.shape), device=engine.device)
        shard, score = here.get(prunable.name, (None, whole[:0]))
        if shard is not None:
            whole[shard.start:shard.start + len(score)] = score
        whole = engine.all_reduce(whole)
        mask = matrix_mask(prunable.rows(whole), action.scope, group, of_layer[prunable.name])
        has_nan.append(whole.isnan().any())
        if shard is not None:
            parts[prunable.name] = prunable.stored(mask)[shard.start:shard.start + len(score)]
    refuse_nan(has_nan)  # last, so that the host has asked for all masks before it waits
    return [parts[shard.name] for shard in engine.prunable_shards]


def thresholds(engine: Engine, action: Action) -> list[float]:
    """The cut of each prunable shard: a threshold is the budget whose selection is a comparison. Collective."""
    cut, shards = action.threshold, engine.prunable_shards
    assert cut is not None
    if action.threshold_unit == "absolute":
        return [cut] * len(shards)
    of_layer = {}
    for prunable in engine.prunables:
        values = [shard.values for shard in shards if shard.name == prunable.name]
        of_layer[prunable.name] = std_threshold(cut, *engine.all_reduce(moments(values).to(engine.device)).tolist())
    return [of_layer[shard.name] for shard in shards]
