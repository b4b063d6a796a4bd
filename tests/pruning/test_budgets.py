"""How many go: weights by exact decimal arithmetic, units by their sizes, and the path within a round."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysearch.pruning.budgets import (
    erdos_renyi,
    evened,
    masks_are_due,
    num_to_prune,
    owl,
    pruning_steps,
    sparsity_at,
    units_to_keep,
)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.integers(1, 9), st.floats(0, 1))
def test_units_of_one_size_go_as_weights_do(scores: list[float], size: int, sparsity: float) -> None:
    values, num = torch.tensor(scores), len(scores)
    everybody = torch.ones(num, dtype=torch.bool)
    keep = units_to_keep(values, torch.full((num,), size), everybody, num_to_prune(sparsity, num * size))
    assert abs(int((~keep).sum()) - sparsity * num) <= 0.5 + 0.5 / size
    assert (~keep).tolist() == [index in values.argsort(stable=True)[:int((~keep).sum())].tolist() for index in range(num)]


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 9), st.booleans()), min_size=1, max_size=15), st.floats(0, 1))
def test_the_budget_is_met_within_half_a_unit_and_nothing_comes_back(units: list[tuple[float, int, bool]], part: float) -> None:
    scores, sizes, eligible = (torch.tensor(column) for column in zip(*units))
    num_prune = round(part * int(sizes.sum()))
    keep = units_to_keep(scores, sizes, eligible, num_prune)
    assert not (keep & ~eligible).any()
    gone = int(sizes[~keep].sum())
    if gone > int(sizes[~eligible].sum()):
        assert abs(gone - num_prune) <= sizes.max() / 2
    assert not keep.any() or not (eligible & ~keep).any() or scores[keep].min() >= scores[eligible & ~keep].max()


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400), st.integers(1, 4)), min_size=1, max_size=8),
       st.floats(0, 0.99))
def test_erdos_renyi_is_its_definition(layers: list[tuple[int, int, int]], sparsity: float) -> None:
    """Against a search for eps by bisection: density_l = min(1, eps (O + K) / (O K)), and the budget is met in all."""
    shapes, sizes = [layer[:2] for layer in layers], [math.prod(layer) for layer in layers]

    def kept(eps: float) -> list[float]:
        return [min(1.0, eps * (o + k) / (o * k)) for o, k in shapes]

    low, high = 0.0, 1000.0
    for _ in range(100):
        eps = (low + high) / 2
        enough = sum(size * each for size, each in zip(sizes, kept(eps))) >= (1 - sparsity) * sum(sizes)
        low, high = (low, eps) if enough else (eps, high)
    found = erdos_renyi(shapes, sizes, sparsity)
    assert found == pytest.approx([1 - each for each in kept(eps)], abs=1e-6)
    assert all(0 <= each <= 1 for each in found)
    later = erdos_renyi(shapes, sizes, (1 + sparsity) / 2)
    assert all(after >= before - 1e-12 for before, after in zip(found, later))  # along a path nothing comes back


@given(st.lists(st.tuples(st.floats(0, 0.05), st.integers(1, 400)), min_size=1, max_size=8), st.floats(0, 0.99),
       st.floats(0, 1))
def test_owl_meets_its_budget_and_blocks_with_more_outliers_keep_more(blocks: list, sparsity: float, reach: float) -> None:
    outliers, sizes = [block[0] for block in blocks], [block[1] for block in blocks]
    found = owl(outliers, sizes, sparsity, reach)
    assert all(0 <= each <= 1 for each in found)
    assert sum(size * each for size, each in zip(sizes, found)) == pytest.approx(sparsity * sum(sizes), abs=1e-9 * sum(sizes))
    assert all(a >= b for (_, a), (_, b) in itertools.pairwise(sorted(zip(outliers, found), key=lambda pair: pair[0]))
               if a != b) or len(set(outliers)) < len(outliers)
    assert max(found) - min(found) <= 2 * reach + 1e-9
    later = owl(outliers, sizes, (1 + sparsity) / 2, reach)
    assert all(after >= before - 1e-9 for before, after in zip(found, later))  # along a path nothing comes back


def test_owl_is_its_definition() -> None:
    """As the authors' code has it, for blocks of one size whose densities stay within 0 and 1."""
    outliers = [0.010, 0.012, 0.004, 0.007]
    density = [(each - 0.004) / 0.008 * 2 * 0.08 for each in outliers]
    wanted = [1 - (each - sum(density) / 4 + 0.3) for each in density]
    assert owl(outliers, [50] * 4, 0.7, 0.08) == pytest.approx(wanted, abs=1e-12)
    assert owl([0.01] * 3, [50] * 3, 0.5, 0.08) == [0.5] * 3
    assert owl(outliers, [50] * 4, 0.7, 0.0) == [0.7] * 4
    assert owl([0.0, 1.0], [100, 100], 0.95, 0.5) == [1.0, 0.9]  # the first block would have less than nothing


def test_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="scores must be numbers, got NaN"):
        units_to_keep(torch.tensor([1.0, float("nan")]), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), 1)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 37, 1000])
@pytest.mark.parametrize("interval", [1, 7, 5000])
def test_the_path_within_a_round_rises_and_ends_at_its_target(num_steps: int, interval: int) -> None:
    path = [sparsity_at(step, num_steps, 0.2, 0.9) for step in range(1, num_steps + 1)]
    assert path == sorted(path)
    assert path[-1] == 0.9
    first, last = pruning_steps(num_steps)
    assert 1 <= first <= last <= num_steps
    due = [step for step in range(1, num_steps + 1) if masks_are_due(step, num_steps, interval)]
    assert due[-1] == last
    assert path[last - 1] == 0.9  # the last change brings the target, and what follows trains under it
    assert all(step >= first for step in due)


def test_as_many_stay_in_every_group_the_highest_of_what_may() -> None:
    """Against sorting in loops; groups that keep 2, 0 and 1 of what is eligible, and ties, of which the later stay."""
    scores = torch.tensor([5.0, 1.0, 4.0, 4.0, 2.0, 2.0, -1.0, 9.0, 3.0, 3.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    eligible = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    for kept, num in (({0, 2, 6, 8}, 1), ({0, 2, 8}, 1), ({0, 2, 3, 4, 5, 8, 9}, 2)):
        keep = torch.tensor([index in kept for index in range(10)])
        wanted = set()
        for each in range(3):
            members = [index for index in range(10) if group[index] == each and eligible[index]]
            wanted |= set(sorted(members, key=lambda index: (float(scores[index]), index))[-num:])
        assert set(evened(keep, scores, eligible, group).nonzero().view(-1).tolist()) == wanted
