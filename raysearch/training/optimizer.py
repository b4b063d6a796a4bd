"""The optimizer's step, in which masks are kept: AdamW, then proximal L1, then the masks.

DeepSpeed calls `step()` on the fp32 masters, once for each of its groups, frees their gradients right after it and then copies
to the module. So whatever must see a gradient, or must hold of every weight that the module gets, happens inside it.
"""

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from raysearch.pruning.proximal import soft_threshold_

SPARED = ("matrices", "vectors")
"""Groups that hold nothing prunable: biases of pruned heads are masked, but no L1 draws them to 0."""
Gather = Callable[[Tensor, Tensor, Tensor], object]
"""(gathered, weights, gradients), all [n] fp32: adds to the first in place (pruning.criteria)."""


def _chunk(tensor: Tensor) -> int:
    """Elements that are worked on at a time."""
    return 1 << 26 if tensor.is_cuda else 1 << 20


class SparseAdamW(torch.optim.AdamW):
    """AdamW that leaves pruned weights at exactly zero, with a decoupled proximal L1 step.

    The L1 step is w <- sign(w) * max(|w| - lr * l1_lambda, 0) after AdamW's own (Parikh & Boyd 2014, eq. 6.9), which
    gives exact zeros where a subgradient inside Adam gives none.

    Keys of the dictionaries are masters: the flat fp32 tensors of DeepSpeed's groups, padding included. All values have the
    shape of their key.
    """

    l1_lambda: float = 0.0
    gather: Gather | None = None
    """What the round's criterion adds up in every step, for the masters of `gathered`."""

    def __init__(self, groups: Iterable[dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(groups, **kwargs)
        self.masks: dict[Tensor, Tensor] = {}
        """bool on a GPU, 0.0 and 1.0 on a CPU, whose product with a bool is 10 times slower (0.102 against 0.010 s for 25 M
        weights, AMD EPYC, 1 thread, 2026-11-23)."""
        self.gathered: dict[Tensor, Tensor] = {}
        self.latents: dict[Tensor, Tensor] = {}
        """What lies behind the masks while they may still change: the weights as they were when they were pruned, and zero
        where the mask keeps. They pass AdamW unchanged, for their gradient is masked."""
        self.trained: dict[Tensor, Tensor] = {}
        """Where latents are trained too, by the gradients of the masked weights (SR-STE): the masks as the round began, whose
        pruned weights stay so."""
        self.latent_decay = 0.0
        """Added to the gradient of a trained latent, times the latent: SR-STE, Zhou et al. 2021 (arXiv 2102.04010).
        Differs in that AdamW takes the sum, and that the masks follow a path and settle."""
        self.units: Any = None
        """What acts on whole units (unit_lines.py, group_lasso.py): `before(master)` and `behind(master, learning_rate)` it."""
        self.clip_factor: float | Tensor = 1.0
        """What this step's gradients were multiplied with to clip them."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for master in [master for group in self.param_groups for master in group["params"]]:
            if self.units is not None:
                self.units.before(master)
            if master in self.gathered:
                self._look(master)
            if master in self.trained:
                latent = self.latents[master]
                assert master.grad is not None
                master.grad.add_(latent, alpha=self.latent_decay).mul_(self.trained[master])
                master.add_(latent)  # exact: where one is not 0 the other is
        result = super().step(closure)
        self.keep_masks(self.param_groups[0]["lr"])
        return result

    @torch.no_grad()
    def keep_masks(self, learning_rate: float) -> None:
        """The L1 step on what is prunable, and the masks, on the masters of this `step`: DeepSpeed calls it once per group."""
        for group in self.param_groups:
            amount = learning_rate * self.l1_lambda * (group.get("name") not in SPARED)
            for master in group["params"]:
                if master in self.masks:  # biases have none before the first unit of theirs goes, and nothing behind it
                    if master in self.trained:
                        self.latents[master].copy_(master).masked_fill_(self.masks[master].bool(), 0)
                    soft_threshold_(master, amount).mul_(self.masks[master])
                if self.units is not None:
                    self.units.behind(master, learning_rate)

    def restart(self) -> None:
        """Forgets the moments, the step count, and what was gathered for the round before."""
        self.forget_steps()
        self.hold_masks()

    def forget_steps(self) -> None:
        """The moments and the step count, in place."""
        for state in self.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def hold_masks(self) -> None:
        """Masks move no more: what was gathered, and what lies behind them, is gone."""
        self.gather, self.gathered, self.latents, self.trained, self.latent_decay = None, {}, {}, {}, 0.0
        self.units = None

    def forget_moments(self, master: Tensor, where: Tensor) -> None:
        """Sets Adam's moments to 0 where the mask changed: those of another weight would move it."""
        for name in ("exp_avg", "exp_avg_sq"):
            if name in self.state[master]:
                self.state[master][name].masked_fill_(where, 0)

    def _look(self, master: Tensor) -> None:
        """Gathers from the gradient, in parts so that the sum of weights and latents is never held whole; then masks it where
        latents have to pass unchanged."""
        assert self.gather is not None
        assert master.grad is not None
        flat = [tensor.view(-1).split(_chunk(master)) for tensor in (self.gathered[master], master, master.grad)]
        latents = self.latents[master].view(-1).split(_chunk(master)) if master in self.latents else repeat(0.0)
        for gathered, weights, gradients, latent in zip(*flat, latents):
            self.gather(gathered, weights + latent, gradients / self.clip_factor)
        if master in self.masks and master in self.latents:
            master.grad.mul_(self.masks[master])
