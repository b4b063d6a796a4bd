"""Patterns: which weights stand or fall together. A pattern says to which unit each weight belongs, across parameters.

Single weights (`unstructured`) are their own units and are never written down as such. For the others a unit is an integer,
and a parameter's map is the sum of one number for its row and one for its column, so that it takes no memory per weight.

Adding a pattern is a function and a line in PATTERNS; tests/pruning/test_patterns.py runs every line through one suite.

N:M is no line of it: it says which weights of a group must go, and none of them stand together.

Legend: O outputs, K inputs of a matrix, N units of one module (heads, neurons), U units in all.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

NO_UNIT = -(1 << 40)
"""Of a row or a column that belongs to no unit; no sum with it reaches 0."""


class Matrix(NamedTuple):
    """A prunable matrix."""

    name: str
    shape: tuple[int, int]
    """As stored."""
    transposed: bool
    """Stored [K, O] (GPT-2's Conv1D) instead of [O, K]."""
    bias: str | None
    """Name of the bias [O] that its outputs have."""

    @property
    def num_outputs(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]


class UnitRows(NamedTuple):
    """Outputs, or inputs, of one matrix that belong to the units of one module: heads of an attention, neurons of an MLP."""

    matrix: Matrix
    of_unit: Tensor
    """int64 [N, n]."""
    are_inputs: bool
    """Of the module's last matrix, whose columns read the units."""


class Layout(NamedTuple):
    """What a pattern may know of a model."""

    matrices: Sequence[Matrix]
    attentions: Sequence[Sequence[UnitRows]] = ()
    """Empty where the model's heads are not known."""
    mlps: Sequence[Sequence[UnitRows]] = ()
    """The same of its neurons."""
    blocks: Sequence[Sequence[Matrix]] = ()
    """The matrices of each block; empty where they are not known, or where a block without them would change what it gets."""
    family: str = "this model"
    """Its name, with the settings for which `blocks` is empty."""

    def refusal(self, what: str, needed: str, instead: str) -> ValueError:
        return ValueError(f"{what} needs a model whose {needed}, and those of {self.family} are not; give {instead}, or add "
                          "the family to raysearch/models/architectures.py")


class Part(NamedTuple):
    """The units of one parameter: weight (r, c) belongs to unit rows[r] + columns[c]; a negative sum is none."""

    name: str
    rows: Tensor
    """int64 [R]."""
    columns: Tensor
    """int64 [C]; [1] for a vector."""
    goes_along: bool = False
    """Masked with its unit, but neither scored nor counted: a bias."""
    reads: bool = False
    """Inputs of a matrix that the units' outputs flow into: what scales them scales the unit."""

    @property
    def lies_in_rows(self) -> bool:
        """Of a part whose units lie in its rows or in its columns."""
        return not self.columns.any()


class Units(NamedTuple):
    parts: tuple[Part, ...]
    group: Tensor
    """int64 [U]: the layer of each unit, the comparison group of scope "layer"; of layers 0."""


def by_output(matrix: Matrix, unit: Tensor) -> list[Part]:
    """Parts of a matrix, and of its bias, whose outputs belong to the units `unit` int64 [O]."""
    none = torch.zeros(1, dtype=torch.int64)
    others = torch.zeros(matrix.shape[0 if matrix.transposed else 1], dtype=torch.int64)
    parts = [Part(matrix.name, *((others, unit) if matrix.transposed else (unit, others)))]
    return parts + ([Part(matrix.bias, unit, none, goes_along=True)] if matrix.bias else [])


def by_input(matrix: Matrix, unit: Tensor) -> Part:
    """The part of a matrix whose inputs belong to the units `unit` int64 [K]."""
    others = torch.zeros(matrix.num_outputs, dtype=torch.int64)
    return Part(matrix.name, *((unit, others) if matrix.transposed else (others, unit)), reads=True)


def heads(layout: Layout) -> Units:
    """A head: its rows of queries, keys and values, fused or not, with their biases, and its columns of the output.

    With grouped queries a head is a key-value head with the queries that read it. Layers are attention modules.
    """
    return _of_modules(layout, layout.attentions, "head")


def neurons(layout: Layout) -> Units:
    """A neuron: its row of each first matrix of an MLP (two in a gated one), with its biases, and its column of the last."""
    return _of_modules(layout, layout.mlps, "neuron")


def layers(layout: Layout) -> Units:
    """A layer: all matrices of a block with their biases, without which it hands on what it gets."""
    if not layout.blocks:
        raise layout.refusal("pattern layer", "blocks are known to do no more than add to what they get", "another pattern")
    return _of_blocks(layout.blocks)


def layer_outputs(layout: Layout) -> Units:
    """Of each layer the last matrices of attention and MLP with their biases, without which it hands on what it gets. No
    pattern: what is left behind would still be computed."""
    last = {part.matrix.name for module in (*layout.attentions, *layout.mlps) for part in module if part.are_inputs}
    if not layout.blocks or len(last) != 2 * len(layout.blocks):
        raise layout.refusal("layer_drop", "blocks are known to do no more than add to what they get", "layer_drop 0")
    return _of_blocks([[matrix for matrix in block if matrix.name in last] for block in layout.blocks])


def _of_blocks(blocks: Sequence[Sequence[Matrix]]) -> Units:
    parts = [part for number, block in enumerate(blocks) for matrix in block
             for part in by_output(matrix, torch.full((matrix.num_outputs,), number))]
    return Units(tuple(parts), torch.zeros(len(blocks), dtype=torch.int64))


def blocks(layout: Layout, side: int = 32) -> Units:
    """A block: `side` x `side` weights of a matrix, fewer at its ends, Lagunas et al. 2021 (arXiv 2109.04838) section 3.2.
    Layers are matrices."""
    return _tiles(layout.matrices, side)


def hybrid(layout: Layout) -> Units:
    """Blocks of 32 in attention, and the neurons of MLPs: "hybrid" of Lagunas et al. 2021 section 3.3. Differs in that a row of
    a first matrix goes with the column of the last, so that both can be cut out. Layers are attention's matrices, then MLPs."""
    attention = {part.matrix.name: part.matrix for module in layout.attentions for part in module}
    if not attention:
        raise layout.refusal("pattern hybrid", "heads and neurons are known", "pattern block")
    tiles, neurons = _tiles(list(attention.values()), 32), _of_modules(layout, layout.mlps, "neuron")
    behind = tuple(part._replace(rows=part.rows + len(tiles.group)) for part in neurons.parts)
    return Units(tiles.parts + behind, torch.cat([tiles.group, neurons.group + len(attention)]))


def _tiles(matrices: Sequence[Matrix], side: int) -> Units:
    parts, group, num_units = [], [], 0
    for layer, matrix in enumerate(matrices):
        down, across = (-(-size // side) for size in matrix.shape)
        rows, columns = (torch.arange(size) // side for size in matrix.shape)
        parts.append(Part(matrix.name, num_units + rows * across, columns))
        group.append(torch.full((down * across,), layer))
        num_units += down * across
    return Units(tuple(parts), torch.cat(group))


def _of_modules(layout: Layout, modules: Sequence[Sequence[UnitRows]], pattern: str) -> Units:
    if not modules:
        raise layout.refusal(f"pattern {pattern}", f"{pattern}s are known", "another pattern")
    parts: list[Part] = []
    group: list[Tensor] = []
    num_units = 0
    for layer, module in enumerate(modules):
        num_here = len(module[0].of_unit)
        for matrix, of_unit, are_inputs in module:
            size = sum(matrix.shape) - matrix.num_outputs if are_inputs else matrix.num_outputs
            unit = torch.full((size,), NO_UNIT)
            unit[of_unit] = torch.arange(num_units, num_units + num_here)[:, None]
            parts += [by_input(matrix, unit)] if are_inputs else by_output(matrix, unit)
        group.append(torch.full((num_here,), layer))
        num_units += num_here
    return Units(tuple(parts), torch.cat(group))


PATTERNS: dict[str, Callable[[Layout], Units] | None] = {
    "unstructured": None,
    "head": heads,
    "neuron": neurons,
    "layer": layers,
    "block": blocks,
    "block64": partial(blocks, side=64),
    "hybrid": hybrid,
}


class NOfM(NamedTuple):
    """At most `num_kept` of every `size` consecutive weights along a matrix's inputs stay."""

    num_kept: int
    size: int

    @property
    def sparsity(self) -> float:
        """Of whole groups; a ragged end loses fewer. To 12 decimals, like every sparsity of an action."""
        return round(1 - self.num_kept / self.size, 12)


def n_of_m(pattern: str) -> NOfM | None:
    """Of "2:4" and its kin; None for a line of PATTERNS. ValueError for what is neither."""
    if pattern in PATTERNS:
        return None
    found = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", pattern)
    if found is None or not (rule := NOfM(*map(int, found.groups()))).num_kept < rule.size:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, or N:M with N below M, which keeps at most N of every "
                         f"M consecutive inputs (2:4), got {pattern!r}")
    return rule


def unit_sizes(units: Units) -> Tensor:
    """int64 [U]: the weights of each unit, without what goes along."""
    sizes = torch.zeros(len(units.group) + 1, dtype=torch.int64)  # the last is of no unit
    for part in (part for part in units.parts if not part.goes_along):
        rows, num_rows = torch.unique(part.rows, return_counts=True)
        columns, num_columns = torch.unique(part.columns, return_counts=True)
        unit = (rows[:, None] + columns).flatten()
        sizes.index_add_(0, torch.where(unit < 0, len(units.group), unit), (num_rows[:, None] * num_columns).flatten())
    return sizes[:-1]


def over_layer_norms(scores: Tensor, units: Units) -> Tensor:
    """fp64 [U]: each score over the norm of its layer's, Molchanov et al. 2016 (arXiv 1611.06440) section 2.2."""
    squares = torch.zeros(int(units.group.max()) + 1, dtype=torch.float64).index_add_(0, units.group, scores.square())
    return scores / squares.sqrt()[units.group].clamp(min=torch.finfo(torch.float64).tiny)


class Stretch(NamedTuple):
    """The units of a stretch of a flattened parameter: of the rows on which it lies, the different ones and the different
    columns, since most weights of a line are of one unit."""

    unit: Tensor
    """int64 [R, C], of different rows and columns; the number of units where none."""
    row_of: Tensor
    """int64 [rows]: which of the R."""
    column_of: Tensor
    """int64 [columns]: which of the C."""
    column: int
    """Of the first weight in its row."""
    num: int
    """Weights."""

    def spread(self, of_unit: Tensor) -> Tensor:
        """[num]: each weight its unit's of [U + 1]."""
        table = of_unit[self.unit]
        table = table[self.row_of] if len(self.unit) > 1 else table.expand(len(self.row_of), -1)
        table = table[:, self.column_of] if self.unit.shape[1] > 1 else table.expand(-1, len(self.column_of))
        return table.reshape(-1)[self.column:self.column + self.num]

    def add_to(self, sums: Tensor, numbers: Tensor) -> None:
        """Adds int64 [num] to the sums [U + 1] of their units: over equal rows and over equal columns first, since a GPU adds
        to one place one after the other."""
        behind = len(self.row_of) * len(self.column_of) - self.column - self.num
        table = torch.nn.functional.pad(numbers, (self.column, behind)).view(len(self.row_of), -1)
        num_rows, num_columns = self.unit.shape
        table = (table.sum(0, keepdim=True) if num_rows == 1
                 else table.new_zeros(num_rows, table.shape[1]).index_add_(0, self.row_of, table))
        table = (table.sum(1, keepdim=True) if num_columns == 1
                 else table.new_zeros(num_rows, num_columns).index_add_(1, self.column_of, table))
        sums.index_add_(0, self.unit.flatten(), table.flatten())


def stretch(part: Part, start: int, num: int, num_units: int, device: torch.device) -> Stretch:
    """Of `num` weights, at least one, from `start` on."""
    row, column = divmod(start, len(part.columns))
    rows, row_of = torch.unique(part.rows[row:-(-(start + num) // len(part.columns))], return_inverse=True)
    columns, column_of = torch.unique(part.columns, return_inverse=True)
    unit = rows[:, None] + columns
    unit = torch.where(unit < 0, num_units, unit)
    return Stretch(unit.to(device), row_of.to(device), column_of.to(device), column, num)
