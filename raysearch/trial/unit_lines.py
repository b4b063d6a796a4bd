"""Rows and columns of shards that belong to units: summed and multiplied in every step, where `units.py` would be too slow.

A sum is taken line by line in fp32, and over lines and ranks as integers, in which no order of adding shows.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from raysearch.pruning.patterns import Part, Units
from raysearch.training.engine import Engine, Shard

SCALE = 2.0**40


class Lines(NamedTuple):
    """Of one shard: its weights as a table of `height` rows, the first and the last of which may lie on other ranks too."""

    shard: Shard
    unit: Tensor
    """int64 [rows or columns of the table]; the number of units where a line belongs to none."""
    are_rows: bool
    column: int
    """Of the shard's first weight."""
    num_columns: int

    def table(self, flat: Tensor) -> Tensor:
        """[height, columns] of a tensor [n] in the shard's order; a view where the shard is made of whole rows."""
        missing = -(self.column + len(flat)) % self.num_columns
        whole = torch.nn.functional.pad(flat, (self.column, missing)) if self.column or missing else flat
        return whole.view(-1, self.num_columns)

    def scale_(self, flat: Tensor, factors: Tensor) -> None:
        """Multiplies a tensor [n] in the shard's order, in place, by the factor of each weight's unit; factors [U + 1]."""
        of_line = factors[self.unit]
        table = self.table(flat).mul_(of_line[:, None] if self.are_rows else of_line)
        if self.column or table.numel() > len(flat):
            flat.copy_(table.view(-1)[self.column:self.column + len(flat)])

    def add_to(self, sums: Tensor, flat: Tensor, sizes: Tensor | None = None) -> None:
        """Adds a tensor [n] in the shard's order, summed over each unit, to int64 [U + 1] in units of 1 / SCALE; with `sizes`
        [U + 1] over them, each unit's."""
        of_line = self.table(flat).sum(1 if self.are_rows else 0).double()
        of_line = of_line if sizes is None else of_line / sizes[self.unit]
        sums.index_add_(0, self.unit, (of_line * SCALE).round().long())


def unit_lines(engine: Engine, units: Units, is_wanted: Callable[[Part], bool]) -> dict[Tensor, list[Lines]]:
    """By master, of the parts that are wanted."""
    found: dict[Tensor, list[Lines]] = {}
    for shard in engine.shards:
        for part in units.parts:
            num = shard.values.numel()
            if part.name != shard.name or not is_wanted(part) or not num:
                continue
            row, column = divmod(shard.start, len(part.columns))
            are_rows = part.lies_in_rows
            unit = part.rows[row:-(-(shard.start + num) // len(part.columns))] if are_rows else part.columns
            assert are_rows or not part.rows.any(), "a part's units lie in its rows or in its columns"
            unit = torch.where(unit < 0, len(units.group), unit).to(engine.device)
            found.setdefault(shard.master, []).append(Lines(shard, unit, are_rows, column, len(part.columns)))
    return found


class Scaled:
    """Weights w that are multiplied by a factor z of their unit between steps, when masters and module hold w z; inside the
    step w comes back, with z times the gradient. No graph changes. 4 bytes a weight."""

    def __init__(self, engine: Engine, lines: dict[Tensor, list[Lines]], factors: Tensor, following: Tensor) -> None:
        """`factors` [U]: z now; `following` [U]: behind the step to come."""
        self.engine, self.lines, self.factors, self.following = engine, lines, factors, following
        self.sums = torch.zeros(len(factors) + 1, dtype=torch.int64, device=engine.device)
        """Of w dL/d(w z) over each unit since `slopes`: of z the gradient."""
        self.weights = {lines.shard.name: lines.shard.values.clone() for lines in self._all()}
        self.scale(factors)
        engine.optimizer.units = self

    def before(self, master: Tensor) -> None:
        assert master.grad is not None
        for lines in self.lines.get(master, ()):
            weights, gradients = self.weights[lines.shard.name], lines.shard.part(master.grad)
            lines.shard.values.copy_(weights)
            lines.add_to(self.sums, weights * gradients / self.engine.optimizer.clip_factor)
            lines.scale_(gradients, _with_rest(self.factors))

    def behind(self, master: Tensor, learning_rate: float) -> None:
        for lines in self.lines.get(master, ()):
            self.weights[lines.shard.name].copy_(lines.shard.values)
            lines.scale_(lines.shard.values, _with_rest(self.following))

    def slopes(self) -> Tensor:
        """fp64 [U], dL/dz of the steps since the last call. Collective."""
        slopes = self.engine.all_reduce(self.sums)[:-1].double() / SCALE
        self.sums.zero_()
        return slopes

    def bring_back(self) -> None:
        """Masters hold w, until `scale`; `sync` is the caller's."""
        for lines in self._all():
            lines.shard.values.copy_(self.weights[lines.shard.name])

    def scale(self, factors: Tensor) -> None:
        """From w as masters hold it to w z, in the module too."""
        for lines in self._all():
            self.weights[lines.shard.name].copy_(lines.shard.values)
            lines.scale_(lines.shard.values, _with_rest(factors))
        self.engine.sync()

    def _all(self) -> Iterator[Lines]:
        return (lines for of_master in self.lines.values() for lines in of_master)


def _with_rest(factors: Tensor) -> Tensor:
    """And 1 for lines of no unit."""
    return torch.nn.functional.pad(factors, (0, 1), value=1.0)
