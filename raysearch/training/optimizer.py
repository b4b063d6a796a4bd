"""The optimizer's step, in which masks are kept: AdamW, then proximal L1, then the masks."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from raysearch.pruning.proximal import soft_threshold_


class SparseAdamW(torch.optim.AdamW):
    """AdamW that leaves pruned weights at exactly zero, with a decoupled proximal L1 step.

    The L1 step is w <- sign(w) * max(|w| - lr * l1_lambda, 0) after AdamW's own (Parikh & Boyd 2014, eq. 6.9), which
    gives exact zeros where a subgradient inside Adam gives none.
    """

    l1_lambda: float = 0.0

    def __init__(self, groups: Iterable[dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(groups, **kwargs)
        self.keep: dict[Tensor, Tensor] = {}
        """Flat fp32 master of prunable weights -> its mask; bool on a GPU, 0.0 and 1.0 on a CPU, whose product with a bool is
        10 times slower (0.102 against 0.010 s for 25 M weights, AMD EPYC, 1 thread, 2026-11-23)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.keep_masks(self.param_groups[0]["lr"])
        return result

    @torch.no_grad()
    def keep_masks(self, learning_rate: float) -> None:
        """The L1 step and the masks, on the masters of this `step`: DeepSpeed calls it once per group."""
        for group in self.param_groups:
            for master in group["params"]:
                if master in self.keep:
                    soft_threshold_(master, learning_rate * self.l1_lambda).mul_(self.keep[master])

    def restart(self) -> None:
        """Forgets the moments and the step count, in place."""
        for state in self.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()
