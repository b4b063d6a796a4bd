"""LayerDrop: in every step each layer is left out with a chance, so that what is left can do without it."""

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.models.architectures import layout
from raysearch.pruning.patterns import layer_outputs
from raysearch.training.engine import Engine
from raysearch.trial.unit_lines import Scaled, unit_lines


class LayerDrop:
    """Of one round, Fan et al. 2019 (arXiv 1909.11556) section 3: a layer whose outputs are multiplied by 0 hands on what it
    gets, and learns nothing in that step. All sequences of a step lose the same layers, on every rank; nothing is rescaled."""

    def __init__(self, engine: Engine, action: Action) -> None:
        self.engine, self.chance = engine, action.layer_drop
        units = layer_outputs(layout(engine.model, engine.prunables))
        self.num_layers = len(units.group)
        self.generator = torch.Generator().manual_seed(action.seed)  # on the CPU, so that every rank and device draws alike
        self.scaled = Scaled(engine, unit_lines(engine, units, lambda part: True), self._drawn(), self._drawn())

    def after_step(self, step: int) -> None:
        self.scaled.factors, self.scaled.following = self.scaled.following, self._drawn()

    def end(self) -> None:
        """All layers are back."""
        self.scaled.bring_back()
        self.engine.sync()

    def _drawn(self) -> Tensor:
        stays = torch.rand(self.num_layers, generator=self.generator) >= self.chance
        return stays.float().to(self.engine.device, non_blocking=True)
