"""Drop and grow: masks that move within their layers while a round trains, at the sparsity with which it began."""

import math

import torch

from raysearch.config import Action
from raysearch.kernels import selection_passes
from raysearch.pruning.budgets import masks_are_due, pruning_steps
from raysearch.pruning.criteria import CRITERIA
from raysearch.pruning.regrow import Moves, drop_and_grow, moved_fraction, random_growth
from raysearch.pruning.selection import SCORES
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
        masks, num_kept, shards = engine.masks(), engine.kept_counts(), engine.prunable_shards
        places = [place for place, shard in enumerate(engine.shards) if shard.name in engine.prunable_names]
        moves = {index: Moves(math.prod(p.shape), num_kept[p.name], math.floor(fraction * num_kept[p.name]))
                 for index, p in engine.prunable_at.items()}
        growth = {shard.name: shard.of(engine.optimizer.gathered) for shard in shards}
        for prunable in engine.prunables if self.gather is None else ():  # every rank draws for every layer
            anywhere = random_growth(math.prod(prunable.shape), self.generator)
            for shard in shards:
                if shard.name == prunable.name:
                    growth[shard.name] = anywhere[shard.start:shard.start + len(shard.values)].clone()
        moved = drop_and_grow([shard.values for shard in shards], [masks[place] for place in places], list(growth.values()),
                              [shard.index for shard in shards], moves, all_reduce=engine.all_reduce, rank=rank,
                              world_size=world_size, passes=selection_passes(SCORES, engine.device))
        for place, mask in zip(places, moved, strict=True):
            masks[place] = mask
        engine.set_masks(masks, grows=True)
