"""The conformance suite of patterns."""

import pytest
import torch

from raysearch.pruning.patterns import (
    PATTERNS,
    Layout,
    Matrix,
    NOfM,
    UnitRows,
    Units,
    by_output,
    heads,
    hybrid,
    layers,
    n_of_m,
    neurons,
    stretch,
    unit_sizes,
)


def row_pairs(layout: Layout) -> Units:
    """Two outputs, one after the other, stand or fall together: a new pattern is a function and a line."""
    parts, group, num_units = [], [], 0
    for layer, matrix in enumerate(layout.matrices):
        pairs = torch.arange(matrix.num_outputs) // 2
        parts += by_output(matrix, num_units + pairs)
        group.append(torch.full((int(pairs.max()) + 1,), layer))
        num_units += len(group[-1])
    return Units(tuple(parts), torch.cat(group))


TENANTS = {**{name: pattern for name, pattern in PATTERNS.items() if pattern is not None}, "row_pairs": row_pairs}


def layout() -> Layout:
    """One attention of 3 heads of 2 with a fused Conv1D, one of 2 key-value heads of 2 with two queries each; two MLPs."""
    fused = Matrix("0.qkv.weight", (5, 18), True, "0.qkv.bias")
    out = Matrix("0.out.weight", (6, 5), True, None)
    within = torch.arange(2)
    of_head = torch.cat([torch.arange(3)[:, None] * 2 + third * 6 + within for third in range(3)], dim=1)
    q, k, v = (Matrix(f"1.{name}.weight", (rows, 5), False, None) for name, rows in (("q", 8), ("k", 4), ("v", 4)))
    out_1 = Matrix("1.out.weight", (5, 8), False, "1.out.bias")
    queries, values = torch.arange(8).view(2, 4), torch.arange(4).view(2, 2)
    first, last = Matrix("0.fc.weight", (5, 7), True, "0.fc.bias"), Matrix("0.last.weight", (7, 5), True, "0.last.bias")
    up, gate, down = (Matrix(f"1.{name}.weight", shape, False, None)
                      for name, shape in (("up", (4, 5)), ("gate", (4, 5)), ("down", (5, 4))))
    seven, four = torch.arange(7)[:, None], torch.arange(4)[:, None]
    return Layout([fused, out, q, k, v, out_1, first, last, up, gate, down], [
        [UnitRows(out, torch.arange(6).view(3, 2), True), UnitRows(fused, of_head, False)],
        [UnitRows(out_1, queries, True), UnitRows(q, queries, False), UnitRows(k, values, False),
         UnitRows(v, values, False)]], [
        [UnitRows(last, seven, True), UnitRows(first, seven, False)],
        [UnitRows(down, four, True), UnitRows(up, four, False), UnitRows(gate, four, False)]],
        [[fused, out, first, last], [q, k, v, out_1, up, gate, down]])


def whole(units: Units, matrix: Matrix) -> torch.Tensor:
    """The units of a whole matrix, by three nested loops over what a part says."""
    table = torch.full(matrix.shape, -1)
    for part in units.parts:
        if part.name == matrix.name:
            for r in range(matrix.shape[0]):
                for c in range(matrix.shape[1]):
                    table[r, c] = max(-1, int(part.rows[r]) + int(part.columns[c]))
    return table


@pytest.mark.parametrize("name", TENANTS)
def test_units_are_numbered_without_gaps_and_each_has_weights_and_a_layer(name: str) -> None:
    units, described = TENANTS[name](layout()), layout()
    seen = torch.cat([whole(units, matrix).flatten() for matrix in described.matrices]).unique()
    assert seen[seen >= 0].tolist() == list(range(len(units.group)))
    assert units.group.tolist() == sorted(units.group.tolist())


@pytest.mark.parametrize("name", TENANTS)
def test_maps_have_the_shapes_of_their_parameters(name: str) -> None:
    described = layout()
    shapes = {matrix.name: matrix.shape for matrix in described.matrices}
    shapes |= {matrix.bias: (matrix.num_outputs, 1) for matrix in described.matrices if matrix.bias}
    parts = TENANTS[name](described).parts
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert (len(part.rows), len(part.columns)) == shapes[part.name]
        assert part.goes_along == (part.name not in {matrix.name for matrix in described.matrices})


@pytest.mark.parametrize("name", TENANTS)
def test_shards_cut_anywhere_say_the_same(name: str) -> None:
    units, described = TENANTS[name](layout()), layout()
    num_units = len(units.group)
    scored = torch.zeros(num_units + 1, dtype=torch.int64)
    for matrix in described.matrices:
        for part in (part for part in units.parts if part.name == matrix.name):
            flat = whole(units, matrix).flatten()
            for cut in (0, 1, 13, flat.numel()):
                pieces = [stretch(part, start, num, num_units, torch.device("cpu"))
                          for start, num in ((0, cut), (cut, flat.numel() - cut)) if num]
                joined = torch.cat([piece.spread(torch.arange(num_units + 1)) for piece in pieces])
                assert torch.equal(joined, torch.where(flat < 0, num_units, flat))
                numbers, sums = torch.arange(1, flat.numel() + 1), torch.zeros(num_units + 1, dtype=torch.int64)
                for piece, here in zip(pieces, numbers.split([piece.num for piece in pieces])):
                    piece.add_to(sums, here)
                assert torch.equal(sums, torch.zeros_like(sums).index_add_(0, joined, numbers))
                scored[:] += 0 if cut or part.goes_along else joined.bincount(minlength=num_units + 1)
    assert torch.equal(unit_sizes(units), scored[:-1])


def test_a_head_is_its_rows_and_columns() -> None:
    units, described = heads(layout()), layout()
    fused, out, q, k, v, out_1, *mlps = (whole(units, matrix) for matrix in described.matrices)
    assert fused[0].tolist() == [0, 0, 1, 1, 2, 2] * 3  # Conv1D: outputs are columns
    assert out[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert q[:, 0].tolist() == [3] * 4 + [4] * 4
    assert k[:, 0].tolist() == v[:, 0].tolist() == [3, 3, 4, 4]
    assert out_1[0].tolist() == [3] * 4 + [4] * 4
    assert all((mlp == -1).all() for mlp in mlps)
    (bias,) = [part for part in units.parts if part.goes_along]
    assert (bias.name, bias.rows.tolist()) == ("0.qkv.bias", [0, 0, 1, 1, 2, 2] * 3)


def test_a_neuron_is_a_row_of_each_first_matrix_and_a_column_of_the_last() -> None:
    """In loops over every weight and bias of the two MLPs."""
    units, described = neurons(layout()), {matrix.name: matrix for matrix in layout().matrices}
    for name, start, outputs_are_neurons in (("0.fc", 0, True), ("0.last", 0, False), ("1.up", 7, True), ("1.gate", 7, True),
                                             ("1.down", 7, False)):
        matrix = described[f"{name}.weight"]
        table = whole(units, matrix)
        for r in range(matrix.shape[0]):
            for c in range(matrix.shape[1]):
                assert table[r, c] == start + (c if matrix.transposed == outputs_are_neurons else r), (name, r, c)
    assert all((whole(units, described[name]) == -1).all() for name in described if "qkv" in name or ".out" in name)
    (bias,) = [part for part in units.parts if part.goes_along]
    assert (bias.name, bias.rows.tolist()) == ("0.fc.bias", list(range(7)))  # that of the last matrix is of no neuron
    assert units.group.tolist() == [0] * 7 + [1] * 4


@pytest.mark.parametrize(("name", "side"), [("block", 32), ("block64", 64)])
def test_a_block_is_a_square_of_a_matrix(name: str, side: int) -> None:
    """In loops; the ends are ragged."""
    shapes = {"a": (70, 40), "b": (64, 130), "c": (3, 5)}
    matrices = [Matrix(each, shape, False, None) for each, shape in shapes.items()]
    units, first = PATTERNS[name](Layout(matrices)), 0
    for layer, matrix in enumerate(matrices):
        table, across = whole(units, matrix), -(-matrix.shape[1] // side)
        for r in range(0, matrix.shape[0]):
            for c in range(0, matrix.shape[1]):
                assert table[r, c] == first + (r // side) * across + c // side
        num = -(-matrix.shape[0] // side) * across
        assert units.group[first:first + num].tolist() == [layer] * num
        first += num
    assert len(units.group) == first


def test_hybrid_is_blocks_of_attention_and_neurons() -> None:
    units, described = hybrid(layout()), layout()
    own = neurons(layout())
    num = len(units.group) - len(own.group)
    assert num == 6  # one block for each matrix of attention, which are small
    for matrix in described.matrices:
        table = whole(units, matrix)
        of_neurons = whole(own, matrix)
        if (of_neurons >= 0).any():
            assert torch.equal(table, of_neurons + num)
        else:
            assert len(table.unique()) == 1
    assert {part.name for part in units.parts if part.goes_along} == {"0.fc.bias"}
    with pytest.raises(ValueError, match="pattern hybrid needs a model whose heads and neurons are known"):
        hybrid(Layout(described.matrices))


def test_a_layer_is_all_that_its_block_has() -> None:
    units, described = layers(layout()), layout()
    for matrix in described.matrices:
        assert (whole(units, matrix) == int(matrix.name[0])).all(), matrix.name
    assert {part.name for part in units.parts if part.goes_along} == {m.bias for m in described.matrices if m.bias}
    assert units.group.tolist() == [0, 0]  # compared with each other
    with pytest.raises(ValueError, match="pattern layer needs a model whose blocks are known to do no more than add"):
        layers(Layout(described.matrices))


@pytest.mark.parametrize("pattern", ["head", "neuron"])
def test_units_of_a_model_that_is_not_known_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=f"pattern {pattern} needs a model whose {pattern}s are known"):
        PATTERNS[pattern](Layout(layout().matrices))


def test_any_n_of_m_is_a_pattern() -> None:
    assert n_of_m("unstructured") is None
    assert [n_of_m(name) for name in ("2:4", "1:4", "7:16")] == [NOfM(2, 4), NOfM(1, 4), NOfM(7, 16)]
    assert [n_of_m(name).sparsity for name in ("2:4", "1:4", "2:3")] == [0.5, 0.75, 0.333333333333]
    for name in ("4:4", "5:4", "0:4", "2:0", "2:4:8", "-1:4", "02:4", " 2:4", "2:4\n", "luck", ""):
        with pytest.raises(ValueError, match="or N:M with N below M, which keeps at most N of every M"):
            n_of_m(name)
