"""L0 gates: every head or neuron has a gate that is sampled anew in each step, and those whose gates open least go."""

from collections.abc import Callable

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.pruning.budgets import masks_are_due, pruning_steps, sparsity_at
from raysearch.pruning.hard_concrete import OPEN, open_probability, sample, settled
from raysearch.pruning.patterns import Units
from raysearch.training.engine import Engine
from raysearch.trial.unit_lines import SCALE, unit_lines


class Gates:
    """Of one round: hard concrete gates on heads (Voita et al. 2019, arXiv 1905.09418 section 5) or neurons, with the loss
    L + gate_penalty * mean P(gate > 0).

    A gate scales the columns that read its unit; no graph changes: the masters, and with them the module, hold w z, and
    inside the step w comes back, with z times the gradient. dL/dz is the sum of w dL/d(w z). Differs from theirs in that the
    sparsity is given: along the path to the action's, the units of the lowest log_alpha go, and with the last masks the
    gates settle and become part of the weights; and in that a gate is sampled a step ahead, before it has learned from the
    last one. 4 bytes for each weight that is scaled.
    """

    def __init__(self, engine: Engine, action: Action, num_steps: int, units: Units, start: float,
                 masks_at: Callable[[Tensor, float], list[Tensor | None]]) -> None:
        """`masks_at`: (scores fp64 [U] on the CPU, sparsity) -> masks of the engine's shards."""
        self.engine, self.action, self.num_steps, self.start, self.masks_at = engine, action, num_steps, start, masks_at
        self.lines = unit_lines(engine, units, reading=True)
        self.weights = {lines.shard.name: lines.shard.values.clone() for each in self.lines.values() for lines in each}
        self.log_alpha = torch.full((len(units.group),), OPEN, device=engine.device)
        self.adam = torch.optim.Adam([self.log_alpha], lr=action.score_rate)
        self.generator = torch.Generator().manual_seed(action.seed)  # on the CPU, so that every rank and device draws alike
        self.sums = torch.zeros(len(units.group) + 1, dtype=torch.int64, device=engine.device)
        self.gate, self.following = self._sampled(), self._sampled()
        self._scale(self.gate[0])
        engine.optimizer.units = self
        engine.sync()

    def before(self, master: Tensor) -> None:
        """AdamW gets w and its gradient; what the gates' own is, is added up."""
        assert master.grad is not None
        for lines in self.lines.get(master, ()):
            weights, gradients = self.weights[lines.shard.name], lines.shard.part(master.grad)
            lines.shard.values.copy_(weights)
            lines.add_to(self.sums, weights * gradients / self.engine.optimizer.clip_factor)
            lines.scale_(gradients, self._with_rest(self.gate[0]))

    def behind(self, master: Tensor, learning_rate: float) -> None:
        for lines in self.lines.get(master, ()):
            self.weights[lines.shard.name].copy_(lines.shard.values)
            lines.scale_(lines.shard.values, self._with_rest(self.following[0]))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Nothing is learned once the masks are settled."""
        last = pruning_steps(self.num_steps)[1]
        if step > last:
            return
        slope = self.engine.all_reduce(self.sums)[:-1].double() / SCALE
        opens = open_probability(self.log_alpha)
        penalty = self.action.gate_penalty / len(opens) * opens * (1 - opens)
        self.log_alpha.grad = slope.float() * self.gate[1] + penalty
        self.sums.zero_()
        self.adam.step()
        self.gate, self.following = self.following, self._sampled()
        if masks_are_due(step, self.num_steps, self.action.mask_interval_steps):
            self._prune(sparsity_at(step, self.num_steps, self.start, self.action.sparsity or 0.0), is_last=step == last)

    def _prune(self, sparsity: float, is_last: bool) -> None:
        """By the weights as they are behind their gates."""
        for lines in (lines for each in self.lines.values() for lines in each):
            lines.shard.values.copy_(self.weights[lines.shard.name])
        self.engine.set_masks(self.masks_at(self.log_alpha.double().cpu(), sparsity))
        for lines in (lines for each in self.lines.values() for lines in each):
            self.weights[lines.shard.name].copy_(lines.shard.values)
        if is_last:
            self.engine.optimizer.units = None
        self._scale(settled(self.log_alpha) if is_last else self.gate[0])
        self.engine.sync()

    def _scale(self, gate: Tensor) -> None:
        for lines in (lines for each in self.lines.values() for lines in each):
            lines.scale_(lines.shard.values, self._with_rest(gate))

    def _sampled(self) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(len(self.log_alpha), generator=self.generator)
        return sample(self.log_alpha, uniform.to(self.engine.device, non_blocking=True))

    def _with_rest(self, gate: Tensor) -> Tensor:
        """And 1 for lines of no unit."""
        return torch.nn.functional.pad(gate, (0, 1), value=1.0)
