"""The conformance suite of criteria, and the std threshold against torch on whole tensors."""

import math

import pytest
import torch
from torch import Tensor

from raysearch.pruning.criteria import CRITERIA, Criterion, moments, squares, std_threshold
from raysearch.pruning.selection import SCORES, keep_masks

# a new criterion is a line: this one ranks by magnitude times the steps that it was looked at
TENANTS = {**{name: each for name, each in CRITERIA.items() if each.statistic is None and each.scores is not None},
           "magnitude_times_age": Criterion(lambda weights, age: weights.abs() * age,
                                            lambda age, weights, gradients: age.add_(1), is_gradual=True)}


def some(seed: int, num: int = 257) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed))


def gathered(criterion: Criterion, weights: Tensor, num_steps: int = 3) -> Tensor | None:
    """What the criterion has after a few steps of made-up gradients."""
    if criterion.gather is None:
        return None
    total = torch.zeros_like(weights)
    for step in range(num_steps):
        criterion.gather(total, weights, some(step + 1, len(weights)))
    return total


@pytest.mark.parametrize("name", TENANTS)
def test_scores_are_numbers_of_their_own_and_leave_the_weights_alone(name: str) -> None:
    criterion, weights = TENANTS[name], some(0)
    before = weights.clone()
    total = gathered(criterion, weights)
    scores = criterion.scores(weights, total)
    assert (scores.shape, scores.dtype) == (weights.shape, torch.float32)
    assert scores.isfinite().all()
    assert torch.equal(weights, before)
    assert len(scores.unique()) > 200  # they rank


@pytest.mark.parametrize("name", TENANTS)
def test_a_score_depends_on_its_own_weight_only(name: str) -> None:
    """So shards can be cut anywhere, and in any order."""
    criterion, weights = TENANTS[name], some(0)
    scores = criterion.scores(weights, gathered(criterion, weights))
    parts = []
    for part, start in ((weights[:100], 0), (weights[100:100], 100), (weights[100:], 100)):
        total = None
        if criterion.gather is not None:
            total = torch.zeros_like(part)
            for step in range(3):
                criterion.gather(total, part, some(step + 1)[start:start + len(part)])
        parts.append(criterion.scores(part, total))
    assert torch.equal(torch.cat(parts), scores)


@pytest.mark.parametrize("name", TENANTS)
def test_it_gathers_in_place_and_step_by_step(name: str) -> None:
    criterion, weights = TENANTS[name], some(0)
    if criterion.gather is None:
        return
    one, two = torch.zeros_like(weights), torch.zeros_like(weights)
    criterion.gather(one, weights, some(1))
    assert one.any()
    criterion.gather(two, weights, some(1))
    criterion.gather(two, weights, some(2))
    assert not torch.equal(one, two)
    alone = torch.zeros_like(weights)
    criterion.gather(alone, weights, some(2))
    assert torch.allclose(two, one + alone)


@pytest.mark.parametrize("name", TENANTS)
def test_what_it_keeps_has_the_larger_scores(name: str) -> None:
    criterion, weights = TENANTS[name], some(0)
    scores = criterion.scores(weights, gathered(criterion, weights)).clone()
    mask = keep_masks([scores], [0], 100, passes=SCORES)[0]
    assert scores[mask].min() > scores[~mask].max()


def test_magnitude_ranks_by_size_and_movement_by_direction() -> None:
    weights, gradients = torch.tensor([2.0, -2.0, 0.1, -0.1]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert CRITERIA["magnitude"].scores(weights, None).tolist() == pytest.approx([2.0, 2.0, 0.1, 0.1])
    total = torch.zeros(4)
    CRITERIA["movement"].gather(total, weights, gradients)  # descent goes along -gradient: the second and third grow
    assert CRITERIA["movement"].scores(weights, total).tolist() == pytest.approx([-2.0, 2.0, 0.1, -0.1])


@pytest.mark.parametrize("num_pruned", [0, 30])
def test_wanda_and_ria_are_nested_loops(num_pruned: int) -> None:
    """Some weights, a whole row and a whole column of them, may be pruned already."""
    weights, inputs = some(0, 35).view(5, 7), some(1, 77).view(11, 7)
    weights.flatten()[:num_pruned] = 0
    weights[:, 6] *= num_pruned == 0
    statistic = squares(inputs[:4]) + squares(inputs[4:])
    for i in range(5):
        for j in range(7):
            norm = math.sqrt(sum(float(x) ** 2 for x in inputs[:, j]))
            row, column = sum(abs(float(w)) for w in weights[i]), sum(abs(float(w)) for w in weights[:, j])
            size = abs(float(weights[i, j]))
            assert float(CRITERIA["wanda"].scores(weights, statistic)[i, j]) == pytest.approx(size * norm, rel=1e-5)
            relative = (size / column if column else 0) + (size / row if row else 0)
            assert float(CRITERIA["ria"].scores(weights, statistic)[i, j]) == pytest.approx(relative * norm**0.5, rel=1e-5)


def test_std_threshold_over_shards_equals_the_whole_layer() -> None:
    weight = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.3
    shards = weight.flatten().tensor_split(3)
    total = sum((moments([shard]) for shard in shards), torch.zeros(3, dtype=torch.float64))
    assert total[2] == 3200
    threshold = std_threshold(0.7, *total.tolist())
    assert threshold == pytest.approx(0.7 * weight.double().std(correction=0).item(), rel=1e-10)


def test_std_threshold_of_equal_weights_is_zero() -> None:
    assert std_threshold(2.0, *moments([torch.full((1000,), 0.1)]).tolist()) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((-1.0, 0.0, 1.0, 2), "must be finite and at least 0, got -1"),
        ((math.nan, 0.0, 1.0, 2), "must be finite and at least 0, got nan"),
        ((1.0, 0.0, 0.0, 0), "needs at least one weight, got 0"),
        ((1.0, 0.0, math.inf, 2), "needs finite weights, got a sum of squares of inf"),
    ],
)
def test_std_threshold_refuses(arguments: tuple[float, float, float, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        std_threshold(*arguments)


@pytest.mark.parametrize(("name", "gone"), [
    ("top", [7, 6, 5, 4]), ("bottom", [0, 1, 2, 3]), ("alternate", [7, 5, 3, 1, 6, 4]), ("symmetric", [3, 4, 2, 5])])
def test_layers_go_in_their_order(name: str, gone: list[int]) -> None:
    assert CRITERIA[name].order(8).argsort(stable=True)[:len(gone)].tolist() == gone
    assert CRITERIA[name].order(1).shape == (1,)
    if name == "alternate":  # of an odd number of layers, too
        assert CRITERIA[name].order(5).argsort(stable=True).tolist() == [4, 2, 0, 3, 1]
    if name == "symmetric":
        assert CRITERIA[name].order(5).argsort(stable=True).tolist() == [2, 1, 3, 0, 4]
