"""Soft movement: each weight has a score, trained beside it, and stays while the score's sigmoid is above a threshold."""

import math

import torch

from raysearch.config import Action
from raysearch.pruning.budgets import masks_are_due, pruning_steps, sparsity_at
from raysearch.pruning.criteria import gather_movement
from raysearch.training.engine import Engine


class SoftMovement:
    """Of one round: W' = W * [sigmoid(S) > tau], Sanh et al. 2020 (arXiv 2005.07683) section 4, with the loss L + lambda *
    mean(sigmoid(S)), and dL/dS = dL/dW' * W straight through the mask.

    As in their code S begins at 0 and is trained by Adam, tau follows the cubic path from 0, and lambda rises with it. Differs
    in that the mean is over all weights instead of over the layers' means, and S's learning rate stays. 24 bytes a weight.
    """

    def __init__(self, engine: Engine, action: Action, num_steps: int) -> None:
        self.engine, self.action, self.num_steps = engine, action, num_steps
        self.num_weights = sum(math.prod(p.shape) for p in engine.prunables)
        engine.keep_latents(gather_movement)
        self.scores = {master: torch.zeros_like(master) for master in engine.optimizer.gathered}
        self.adam = torch.optim.Adam(self.scores.values(), lr=action.score_rate, fused=True)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Nothing is scored once the masks are settled."""
        assert self.action.threshold is not None
        last = pruning_steps(self.num_steps)[1]
        if step > last:
            return
        cut = sparsity_at(step, self.num_steps, 0.0, self.action.threshold)
        penalty = self.action.score_penalty * cut / self.action.threshold / self.num_weights
        for master, scores in self.scores.items():
            gathered = self.engine.optimizer.gathered[master]  # - dL/dW' * W
            stays = torch.sigmoid(scores)
            scores.grad = (1 - stays).mul_(stays).mul_(penalty).sub_(gathered)
            gathered.zero_()
        self.adam.step()
        if masks_are_due(step, self.num_steps, self.action.mask_interval_steps):
            masks, latents = self.engine.masks(), self.engine.optimizer.latents
            keep = {master: (torch.sigmoid(scores) > cut) & ((master != 0) | (latents[master] != 0))
                    for master, scores in self.scores.items()}  # what the parent had pruned is 0 in both
            for index, shard in enumerate(self.engine.shards):
                if shard.name in self.engine.prunable_names:
                    masks[index] = shard.of(keep)
            self.engine.set_masks(masks)
        if step == last:
            self.engine.optimizer.gathered = {}
