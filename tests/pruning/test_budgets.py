"""How many go: weights by exact decimal arithmetic, units by their sizes, and the path within a round."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysearch.pruning.budgets import masks_are_due, num_to_prune, pruning_steps, sparsity_at, units_to_keep


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
