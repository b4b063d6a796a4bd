"""Drop and grow against two sorts in plain loops, over shards of any cut, with ties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysearch.pruning.regrow import Moves, drop_and_grow, moved_fraction, random_growth

WEIGHT = st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3))


@given(st.lists(WEIGHT, min_size=1, max_size=40), st.floats(0, 1))
def test_it_is_two_sorts(layer: list[tuple[int, bool, int]], fraction: float) -> None:
    weights, mask, growth = (list(column) for column in zip(*layer))
    kept = [index for index, keeps in enumerate(mask) if keeps]
    num_moved = math.floor(fraction * len(kept))
    stays = kept.copy()
    for _ in range(num_moved):
        stays.remove(min(stays, key=lambda index: (abs(weights[index]), index)))  # of ties the first goes
    grown = sorted((index for index in range(len(layer)) if index not in stays), key=lambda index: (growth[index], index))
    wanted = {*stays, *grown[len(grown) - num_moved:]}
    values, highest = torch.tensor(weights).float(), torch.tensor(growth).float()
    moves = Moves(len(layer), len(kept), num_moved)
    other = torch.arange(5.0)  # another layer is moved by its own numbers
    found, of_other = drop_and_grow([values, other], [torch.tensor(mask), other > 1], [highest, -other], [3, 7],
                                    {3: moves, 5: Moves(0, 0, 0), 7: Moves(5, 3, 2)})
    assert {index for index, keeps in enumerate(found.tolist()) if keeps} == wanted
    assert len(wanted) == len(kept)
    assert of_other.tolist() == [True, True, False, False, True]


def test_fewer_and_fewer_move() -> None:
    path = [moved_fraction(step, 100, 0.3) for step in range(120)]
    assert path == sorted(path, reverse=True)
    assert (path[0], path[50], path[100], path[119]) == pytest.approx((0.3, 0.15, 0.0, 0.0))


def test_random_growth_is_its_generators() -> None:
    one, two, other = (random_growth(1000, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert 0.45 < float(one.mean()) < 0.55
