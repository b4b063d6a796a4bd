"""The pruner: units -> statistics -> scores -> budgets -> selection -> masks, on this rank's shards, with nothing gathered.

A criterion that is gradual (pruning.criteria) prunes during a round, along the path from the parent's sparsity to the action's;
the others as it begins. Everything here is collective, and gives every rank the same masks whatever the world size: single
weights are selected exactly (pruning.selection), and the scores of units are summed as integers, in which no order of adding
shows.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.kernels import selection_passes
from raysearch.models.architectures import layout
from raysearch.pruning.budgets import masks_are_due, num_to_prune, pruning_steps, sparsity_at
from raysearch.pruning.criteria import CRITERIA, magnitude
from raysearch.pruning.patterns import PATTERNS, n_of_m
from raysearch.pruning.selection import MAGNITUDES, SCORES, Passes, keep_masks, reserved, threshold_masks
from raysearch.training.data import Blocks
from raysearch.training.engine import Engine, Shard
from raysearch.trial.contribution import activations, contributions
from raysearch.trial.drop_and_grow import DropAndGrow
from raysearch.trial.first_order import first_order
from raysearch.trial.gates import Gates
from raysearch.trial.group_lasso import GroupLasso
from raysearch.trial.layer_drop import LayerDrop
from raysearch.trial.matrices import LayerSparsities, budget_of, masks_by_row, prune_block_by_block, thresholds
from raysearch.trial.soft_movement import SoftMovement
from raysearch.trial.units import UnitMap

Masks = list[Tensor | None]
"""One bool mask [n], or None, for each of the engine's shards."""


class Pruner:
    """Of one round: `begin` before it trains, `after_step` in it, `end` behind it. Collective."""

    def __init__(self, engine: Engine, action: Action, num_steps: int, text: Blocks | None = None) -> None:
        self.engine, self.action, self.num_steps, self.text = engine, action, num_steps, text
        self.criterion = CRITERIA[action.criterion]
        self.n_of_m = n_of_m(action.pattern)
        find_units = PATTERNS.get(action.pattern)
        self.units = find_units(layout(engine.model, engine.prunables)) if find_units else None
        self._map = UnitMap(engine, self.units) if self.units else None
        self._start = 0.0
        self._of_units: Tensor | None = None
        self._of_layer: LayerSparsities
        self._before: Masks
        self._by_itself: DropAndGrow | Gates | LayerDrop | SoftMovement | None = None

    def begin(self) -> None:
        """Prunes by the weights as they are, or gets ready to prune while it trains."""
        self._begin()
        if self.action.layer_drop:
            self._by_itself = LayerDrop(self.engine, self.action)

    def _begin(self) -> None:
        self._of_layer = budget_of(self.engine, self.action, self.text)
        self._before = self.engine.masks() if self.units else []
        if self.criterion.statistic is not None:
            prune_block_by_block(self.engine, self.action, self.text, self._of_layer)
            return
        if self.criterion.is_soft:
            self._by_itself = SoftMovement(self.engine, self.action, self.num_steps)
            return
        if self.units is not None and self.action.group_lambda:
            GroupLasso(self.engine, self.units, self.action.group_lambda)
        if self.criterion.has_gates and self.units is not None:
            kept, total = self._kept()
            self._by_itself = Gates(self.engine, self.action, self.num_steps, self.units, 1 - kept / total, self._masks_by)
            return
        if self.criterion.by_sequence:
            self._of_units = first_order(self.engine, self.action, self.text, self.units)
        if self.criterion.by_contribution:
            self._of_units = contributions(self.engine, self.action, self.text)
        if self.criterion.by_activation and self.units is not None:
            self._of_units = activations(self.engine, self.action, self.text, self.units)
        if self.criterion.order is not None and self.units is not None:
            self._of_units = self.criterion.order(len(self.units.group))
        if not self.criterion.is_gradual:
            self.engine.set_masks(self._masks(self.action.sparsity))
            self.engine.optimizer.gathered = {}
            if self.criterion.moves:
                self._by_itself = DropAndGrow(self.engine, self.action, self.num_steps)
            return
        if self.criterion.gather is not None or self.criterion.trains_pruned:
            self.engine.keep_latents(self.criterion.gather, [part.name for part in self.units.parts] if self.units else ())
        kept, total = self._kept()
        self._start = 1 - kept / total

    def after_step(self, step: int) -> None:
        """After the engine's step number `step`, counted from 1."""
        if self.criterion.trains_pruned:
            self.engine.optimizer.latent_decay = self.action.mask_decay * min(1.0, step / pruning_steps(self.num_steps)[1])
        if self._by_itself is not None:
            self._by_itself.after_step(step)
        if not self.criterion.is_gradual or not masks_are_due(step, self.num_steps, self.action.mask_interval_steps):
            return
        assert self.action.sparsity is not None
        self.engine.set_masks(self._masks(sparsity_at(step, self.num_steps, self._start, self.action.sparsity)))

    def end(self) -> None:
        """What the round's training brought to exactly 0 is pruned from now on."""
        if isinstance(self._by_itself, LayerDrop):
            self._by_itself.end()
        self.engine.settle_masks()

    # ---- masks ----

    def _masks(self, sparsity: float | None) -> Masks:
        if self._map is not None:
            scores, eligible = self._unit_scores(self._map), self._map.eligible(self._eligible)
            return self._map.masks(self.action, sparsity, scores, eligible, self._before)
        of_prunable = iter(self._weight_masks(sparsity))
        # what units took of biases stays pruned
        return [next(of_prunable) if shard.name in self.engine.prunable_names else shard.of(self.engine.optimizer.masks)
                for shard in self.engine.shards]

    def _weight_masks(self, sparsity: float | None) -> list[Tensor]:
        """Of the prunable shards, each weight by itself."""
        shards = self.engine.prunable_shards
        if self.criterion.scores is magnitude and not self.criterion.trains_pruned and not self._compares_rows:
            # selection reads |w| off the weights; a pruned one is 0 and comes first
            values = [shard.values for shard in shards]
            if sparsity is None:
                return threshold_masks(values, thresholds(self.engine, self.action))
            return self._selected(values, MAGNITUDES, sparsity)
        eligible = [self._eligible(shard) for shard in shards]
        scores = [self._scores(shard, each) for shard, each in zip(shards, eligible)]
        if sparsity is None:
            return [score >= cut for score, cut in zip(scores, thresholds(self.engine, self.action))]
        keep = self._selected(scores, SCORES, sparsity)  # where fewer are to go than are gone, all that are gone stay so
        return [mask.logical_and_(each) for each, mask in zip(eligible, keep)]

    @property
    def _compares_rows(self) -> bool:
        """Whether weights are compared within their row, or a part of it."""
        return self.action.scope == "row" or self.n_of_m is not None

    def _selected(self, scores: Sequence[Tensor], passes: Passes, sparsity: float) -> list[Tensor]:
        """Masks of the prunable shards that keep the highest scores of each comparison group."""
        engine, action = self.engine, self.action
        shards = engine.prunable_shards
        rank, world_size = engine.shard_rank
        passes = selection_passes(passes, engine.device)
        if self.n_of_m is not None:
            stays = masks_by_row(engine, action, self.n_of_m, self._of_layer(sparsity), scores)
            if sparsity >= self.n_of_m.sparsity:
                return stays
            # on the way there: the lowest of those that are to go, of which what is pruned for good, at -inf, is the first
            scores = [score.masked_fill(mask & (score > -math.inf), math.inf) for score, mask in zip(scores, stays)]
        if action.scope == "global":
            num_prune = num_to_prune(sparsity, sum(math.prod(p.shape) for p in engine.prunables))
            if self.n_of_m is not None:
                goes = torch.stack([(score < math.inf).sum() for score in (*scores, torch.zeros(0, device=engine.device))])
                num_prune = min(num_prune, int(engine.all_reduce(goes.sum())))
            return keep_masks(scores, [shard.index for shard in shards], num_prune, all_reduce=engine.all_reduce, rank=rank,
                              world_size=world_size, passes=passes)
        if action.scope == "row":
            return masks_by_row(engine, action, self.n_of_m, self._of_layer(sparsity), scores)
        of_layer = self._of_layer(sparsity)
        of_parameter = {index: num_to_prune(of_layer[p.name], math.prod(p.shape)) for index, p in engine.prunable_at.items()}
        return keep_masks(scores, [shard.index for shard in shards], of_parameter, all_reduce=engine.all_reduce, rank=rank,
                          world_size=world_size, passes=passes)

    def _scores(self, shard: Shard, eligible: Tensor) -> Tensor:
        """fp32 [n], a copy: what is pruned for good below every number."""
        scores = self._criterion_scores(shard)
        return scores.masked_fill(~eligible, -math.inf) if self._compares_rows else reserved(scores, eligible)

    def _eligible(self, shard: Shard) -> Tensor:
        """What may be kept: all but what was pruned before the round. A weight that left its mask in this round has a value
        behind it; one that was pruned before has none."""
        latents = shard.of(self.engine.optimizer.latents)
        return shard.values != 0 if latents is None else (shard.values != 0) | (latents != 0)

    # ---- units ----

    def _masks_by(self, scores: Tensor, sparsity: float) -> Masks:
        self._of_units = scores
        return self._masks(sparsity)

    def _unit_scores(self, units: UnitMap) -> Tensor:
        """fp64 [U]: the mean over a unit's weights."""
        if self._of_units is not None:
            return self._of_units
        sums = units.sums(lambda shard: torch.where(self._eligible(shard), self._criterion_scores(shard), 0))
        return sums / units.sizes.clamp(min=1)

    def _criterion_scores(self, shard: Shard) -> Tensor:
        """fp32 [n], which may be what the criterion gathered itself, of the weights as they are behind their masks."""
        latents = shard.of(self.engine.optimizer.latents)
        weights = shard.values if latents is None else shard.values + latents
        assert self.criterion.scores is not None
        return self.criterion.scores(weights, shard.of(self.engine.optimizer.gathered))

    def _kept(self) -> tuple[int, int]:
        """Weights of the pattern that are not pruned, and all of them."""
        if self._map is None:
            total = sum(math.prod(p.shape) for p in self.engine.prunables)
            kept = self.engine.kept_counts()
            return sum(kept[name] for name in self.engine.prunable_names), total
        sizes = self._map.sizes
        return int(sizes[self._map.eligible(self._eligible)].sum()), int(sizes.sum())
