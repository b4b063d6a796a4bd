"""Drop and grow: masks that move within their layers while a round trains, at the sparsity with which it began."""

import math

import torch

from raysearch.config import Action
from raysearch.pruning.budgets import masks_are_due, pruning_steps
from raysearch.pruning.criteria import CRITERIA
from raysearch.pruning.regrow import drop_and_grow, moved_fraction, random_growth
from raysearch.training.engine import Engine


class DropAndGrow:
    """Of one round, from its first masks on. Collective; masks are the same for every world size."""

    def __init__(self, engine: Engine, action: Action, num_steps: int) -> None:
        self.engine, self.action, self.num_steps = engine, action, num_steps
        self.gather = CRITERIA[action.criterion].gather
        self.generator = torch.Generator(engine.device).manual_seed(action.seed)
        self._watch(1)

    def after_step(self, step: int) -> None:
        if self._is_due(step):
            self._move(moved_fraction(step, pruning_steps(self.num_steps)[1], self.action.drop_fraction))
        self._watch(step + 1)

    def _is_due(self, step: int) -> bool:
        """The last step of the path moves nothing."""
        return step < pruning_steps(self.num_steps)[1] and masks_are_due(step, self.num_steps, self.action.mask_interval_steps)

    def _watch(self, step: int) -> None:
        """Gradients are looked at only where masks move after them, and then forgotten."""
        if self.gather is not None and self._is_due(step):
            self.engine.watch(self.gather)
        else:
            self.engine.optimizer.gathered = {}

    def _move(self, fraction: float) -> None:
        engine = self.engine
        rank, world_size = engine.shard_rank
        masks, num_kept = engine.masks(), engine.kept_counts()
        places = {shard.name: index for index, shard in enumerate(engine.shards)}
        for prunable in engine.prunables:  # a rank that holds nothing of it takes part with an empty shard: it is collective
            num_weights, kept, index = math.prod(prunable.shape), num_kept[prunable.name], places.get(prunable.name)
            anywhere = None if self.gather else random_growth(num_weights, self.generator)
            weights = growth = torch.empty(0, device=engine.device)
            mask = weights.bool()
            if index is not None:
                shard, mask = engine.shards[index], masks[index]
                weights, growth = shard.values, shard.of(engine.optimizer.gathered)
                growth = growth if anywhere is None else anywhere[shard.start:shard.start + len(weights)]
            moved = drop_and_grow(weights, mask, growth, num_weights, kept, math.floor(fraction * kept),
                                  all_reduce=engine.all_reduce, rank=rank, world_size=world_size)
            if index is not None:
                masks[index] = moved
        engine.set_masks(masks, grows=True)
