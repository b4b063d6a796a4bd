"""Group lasso: a proximal step on whole units, which brings some to exactly 0."""

import torch
from torch import Tensor

from raysearch.pruning.patterns import Units, unit_sizes
from raysearch.pruning.proximal import group_factors
from raysearch.training.engine import Engine
from raysearch.trial.unit_lines import SCALE, unit_lines


class GroupLasso:
    """Of one round: behind AdamW, L1 and masks each unit's weights are shrunk towards 0 together (pruning.proximal), by the
    learning rate times group_lambda. Biases are not shrunk.

    A unit's norm is taken once a step, when the first of its masters has been trained: where DeepSpeed trains prunable weights
    in several groups, it counts the others as they were."""

    def __init__(self, engine: Engine, units: Units, strength: float) -> None:
        self.engine, self.strength = engine, strength
        self.lines = unit_lines(engine, units, lambda part: not part.goes_along)
        self.sizes = torch.nn.functional.pad(unit_sizes(units), (0, 1), value=1).to(engine.device)
        self.masters = {shard.master: None for shard in engine.prunable_shards}  # also those without a unit: it is collective
        self.done: set[Tensor] = set()
        self.factors = torch.ones(len(units.group) + 1, device=engine.device)
        engine.optimizer.units = self

    def before(self, master: Tensor) -> None:
        """Nothing."""

    def behind(self, master: Tensor, learning_rate: float) -> None:
        if master not in self.masters:
            return
        if master in self.done or not self.done:
            self.done = set()
            sums = torch.zeros(len(self.factors), dtype=torch.int64, device=self.engine.device)
            for each in self.lines.values():
                for lines in each:
                    lines.add_to(sums, lines.shard.values.square(), self.sizes)
            mean_squares = self.engine.all_reduce(sums)[:-1].double() / SCALE
            self.factors[:-1] = group_factors(mean_squares, learning_rate * self.strength)
        self.done.add(master)
        for lines in self.lines.get(master, ()):
            lines.scale_(lines.shard.values, self.factors)
