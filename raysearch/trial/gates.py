"""L0 gates: every head or neuron has a gate that is sampled anew in each step, and those whose gates open least go."""

from collections.abc import Callable

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.pruning.budgets import masks_are_due, pruning_steps, sparsity_at
from raysearch.pruning.hard_concrete import OPEN, open_probability, sample, settled
from raysearch.pruning.patterns import Units
from raysearch.training.engine import Engine
from raysearch.trial.unit_lines import Scaled, unit_lines


class Gates:
    """Of one round: hard concrete gates on heads (Voita et al. 2019, arXiv 1905.09418 section 5) or neurons, with the loss
    L + gate_penalty * mean P(gate > 0).

    A gate scales the columns that read its unit. Differs from theirs in that the sparsity is given: along the path to the
    action's, the units of the lowest log_alpha go, and with the last masks the gates settle and become part of the weights; and
    in that a gate is sampled a step ahead, before it has learned from the last one.
    """

    def __init__(self, engine: Engine, action: Action, num_steps: int, units: Units, start: float,
                 masks_at: Callable[[Tensor, float], list[Tensor | None]]) -> None:
        """`masks_at`: (scores fp64 [U] on the CPU, sparsity) -> masks of the engine's shards."""
        self.engine, self.action, self.num_steps, self.start, self.masks_at = engine, action, num_steps, start, masks_at
        self.log_alpha = torch.full((len(units.group),), OPEN, device=engine.device)
        self.adam = torch.optim.Adam([self.log_alpha], lr=action.score_rate)
        self.generator = torch.Generator().manual_seed(action.seed)  # on the CPU, so that every rank and device draws alike
        (gate, self.slope), (following, self.following_slope) = self._sampled(), self._sampled()
        self.scaled = Scaled(engine, unit_lines(engine, units, lambda part: part.reads), gate, following)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Nothing is learned once the masks are settled."""
        last = pruning_steps(self.num_steps)[1]
        if step > last:
            return
        opens = open_probability(self.log_alpha)
        penalty = self.action.gate_penalty / len(opens) * opens * (1 - opens)
        self.log_alpha.grad = self.scaled.slopes().float() * self.slope + penalty
        self.adam.step()
        self.scaled.factors, self.slope = self.scaled.following, self.following_slope
        self.scaled.following, self.following_slope = self._sampled()
        if masks_are_due(step, self.num_steps, self.action.mask_interval_steps):
            self.scaled.bring_back()
            sparsity = sparsity_at(step, self.num_steps, self.start, self.action.sparsity or 0.0)
            self.engine.set_masks(self.masks_at(self.log_alpha.double().cpu(), sparsity))
            self.scaled.scale(settled(self.log_alpha) if step == last else self.scaled.factors)
        if step == last:
            self.engine.optimizer.units = None

    def _sampled(self) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(len(self.log_alpha), generator=self.generator)
        return sample(self.log_alpha, self.engine.there(uniform))
