"""ZeRO-0: every rank holds the whole model, and nothing of DeepSpeed is needed.

Masters, gradients and weights are each one flat tensor for every group of parameters, and the module's parameters are views of
it. So what a step does besides the products is a handful of kernels, however many parameters there are: the host, which limits
small models, only queues the forward and the backward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysearch.training.optimizer import SparseAdamW

ALIGNED = 64
"""Weights: where a parameter may begin, so that products read it in whole vectors."""


class Replicated:
    """The module under plain data parallelism. `zero.Sharded` has the same methods."""

    def __init__(self, model: nn.Module, groups: Sequence[dict[str, Any]], clip_norm: float, device: torch.device,
                 **adamw: Any) -> None:
        self.module, self._clip_norm = model.to(device), clip_norm
        self._flats = [_Flat(group["params"], device) for group in groups]
        self.optimizer = SparseAdamW([{**group, "params": [flat.master]} for group, flat in zip(groups, self._flats)], **adamw)

    def frozen(self, load: Callable[[], nn.Module]) -> nn.Module:
        """Another model beside this one, which is not trained."""
        return load().to(self.module.device).requires_grad_(False).eval()

    def pieces(self) -> Iterator[tuple[Tensor, nn.Parameter, int, int, int]]:
        """(master, parameter, first weight of the parameter in it, number of weights, offset in the master)."""
        for flat in self._flats:
            for parameter, offset in zip(flat.parameters, flat.offsets):
                yield flat.master, parameter, 0, parameter.numel(), offset

    @torch.no_grad()
    def sync(self) -> None:
        """Carries the masters to the module's weights."""
        for flat in self._flats:
            if flat.weights is not flat.master:
                flat.weights.copy_(flat.master)

    def forward(self, **inputs: Any) -> Tensor:
        return self.module(**inputs)

    def train_step(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        """One step on the mean of the losses, each of a micro-batch and evaluated in turn; that mean, of this rank."""
        for flat in self._flats:
            flat.begin()
        values = []
        for loss in losses:
            value = loss()
            value.backward()
            for flat in self._flats:
                flat.gather()
            values.append(value.detach())
        num_summed = len(losses) * dist.get_world_size()
        if dist.get_world_size() > 1:
            for flat in self._flats:
                dist.all_reduce(flat.gradients)
        norm = torch.stack([torch.linalg.vector_norm(flat.gradients) for flat in self._flats]).norm() / num_summed
        factor = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.clip_factor = factor
        for flat in self._flats:
            flat.gradients.mul_(factor / num_summed)
        self.optimizer.step()
        self.sync()
        return torch.stack(values).mean()

    def save_checkpoint(self, folder: str, step: int) -> None:
        if dist.get_rank() == 0:
            state = {"masters": [flat.master.detach() for flat in self._flats], "optimizer": self.optimizer.state_dict()}
            torch.save({**state, "step": step}, Path(folder) / "checkpoint.pt")

    def load_checkpoint(self, folder: str) -> int:
        state: Mapping[str, Any] = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for flat, master in zip(self._flats, state["masters"]):
                flat.master.copy_(master)
        self.optimizer.load_state_dict(state["optimizer"])
        self.sync()
        return int(state["step"])


class _Flat:
    """One group: its fp32 master and gradients, and its weights, which are the master itself where they are fp32."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.parameters, self.offsets, end = list(parameters), [], 0
        for parameter in self.parameters:
            self.offsets.append(end)
            end += -(-parameter.numel() // ALIGNED) * ALIGNED
        dtype = self.parameters[0].dtype
        self.weights = torch.zeros(end, dtype=dtype, device=device)
        views = self._views(self.weights)
        for parameter, view in zip(self.parameters, views):
            view.copy_(parameter.data)
            parameter.data = view
        self.master = self.weights if dtype == torch.float32 else self.weights.float()
        self.gradients = torch.zeros_like(self.master)
        self.master.grad = self.gradients
        self._gradient_views = self._views(self.gradients)

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [flat[offset:offset + p.numel()].view(p.shape) for p, offset in zip(self.parameters, self.offsets)]

    def begin(self) -> None:
        """Gradients of fp32 weights are added up where they are made; the first of others are written over the old ones."""
        self.is_first = True
        self.gradients.zero_()
        if self.weights is self.master:
            for parameter, view in zip(self.parameters, self._gradient_views):
                parameter.grad = view

    @torch.no_grad()
    def gather(self) -> None:
        """Adds the gradients of a micro-batch, in fp32."""
        if self.weights is self.master:
            return
        pairs = [(view, p.grad) for view, p in zip(self._gradient_views, self.parameters) if p.grad is not None]
        views, gradients = [view for view, _ in pairs], [gradient for _, gradient in pairs]
        if self.is_first:
            torch._foreach_copy_(views, gradients)
        else:
            torch._foreach_add_(views, gradients)
        self.is_first = False
        for parameter in self.parameters:
            parameter.grad = None
