"""Racing: the bound holds its level, dominated candidates of real models cost far fewer items, frontier members none."""

from typing import Any

import numpy as np
import pytest
import torch
from test_scorer import pair
from tiny_models import story, tiny_model

from raysearch.evaluation import Scorer
from raysearch.evaluation.racing import in_item_order, is_dominated, item_losses, item_order, log_evidence, looks
from raysearch.study.items import Items

NUM_REPLAYS = 200


def items_scored(losses: np.ndarray, rival: np.ndarray, seed: int, level: float) -> int:
    """Of a race in the order of this seed; all items where it is never lost."""
    order = item_order(len(rival), seed)
    return next((n for n in looks(len(rival)) if is_dominated(losses[order][:n], rival[order], level)), len(rival))


@pytest.fixture(scope="module")
def recorded(tokenizer: Any) -> list[np.ndarray]:
    """Losses of the same 1,200 items, [pruned more and more]: a tiny GPT that learned its stories, cut by magnitude."""
    model = tiny_model("gpt2")
    blocks = torch.tensor([tokenizer(story(n))["input_ids"][:96] for n in range(64)])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for step in range(60):
        batch = blocks[step % 4 * 16:step % 4 * 16 + 16]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    requests = []
    for n in range(1200):
        words = story(n % 400).split()
        cut_at = 6 + n // 400 * 3
        requests.append(pair(" ".join(words[:cut_at]), " " + words[cut_at]))
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for sparsity in (0.0, 0.3, 0.6, 0.8, 0.9):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                cut = dense[name].abs().quantile(sparsity) if parameter.dim() > 1 else 0.0
                parameter.copy_(dense[name] * (dense[name].abs() >= cut))
        losses.append(np.array([-logprob for logprob, _ in Scorer(model.eval(), tokenizer).loglikelihood(requests)]))
    return losses


def test_recorded_results_no_wrong_elimination_and_a_quarter_of_the_items(recorded: list[np.ndarray]) -> None:
    means = [losses.mean() for losses in recorded]
    num_items = []
    for seed in range(NUM_REPLAYS // len(recorded)):
        for i, losses in enumerate(recorded):
            for j, rival in enumerate(recorded):
                if i == j:
                    continue
                scored = items_scored(losses, rival, seed, level=0.001)
                if means[i] <= means[j]:
                    assert scored == len(rival)  # better or as good: must never be stopped
                elif means[i] > 1.1 * means[j]:
                    num_items.append(scored)
    assert num_items
    assert np.mean(num_items) < len(recorded[0]) / 4


@pytest.mark.parametrize("kind", ["accuracy", "nats"])
def test_equal_candidates_are_stopped_no_more_often_than_the_level(kind: str) -> None:
    random = np.random.default_rng(0)
    if kind == "accuracy":
        rival = (random.random(1000) < 0.5).astype(float)
        losses = random.permutation(rival)
    else:
        rival = random.exponential(3.0, 1000)
        losses = rival * np.exp(random.normal(0, 0.4, 1000))
        losses *= rival.sum() / losses.sum()
    stopped = sum(items_scored(losses, rival, seed, level=0.1) < 1000 for seed in range(NUM_REPLAYS))
    assert stopped <= 0.1 * NUM_REPLAYS + 3 * (0.1 * 0.9 * NUM_REPLAYS) ** 0.5


def test_certain_once_the_items_left_cannot_catch_up() -> None:
    rival = np.array([0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    assert log_evidence([1, 1, 1, 1, 1], rival) == float("inf")  # 3 behind, at most 0 to gain
    assert log_evidence([0, 0, 1, 1, 0, 0], rival) == pytest.approx(0)
    assert log_evidence([], rival) == 0


def test_looks_grow_and_the_order_is_one_for_all() -> None:
    assert looks(32) == []
    assert looks(300) == [32, 48, 72, 108, 162, 243]
    assert sorted(item_order(50, 3)) == list(range(50))
    assert list(item_order(50, 3)) == list(item_order(50, 3)) != list(item_order(50, 4))


def test_losses_are_nats_and_one_minus_an_accuracy() -> None:
    none = np.zeros(3, np.uint64), np.zeros(3, np.int64)
    assert item_losses(Items(np.array([1.0, 0.0, 0.25]), np.ones(3), *none), higher_is_better=True).tolist() == [0, 1, 0.75]
    nats, num_bytes = np.array([3.0, 0.0, 7.5]), np.array([10.0, 2.0, 4.0])
    assert item_losses(Items(nats, num_bytes, *none), higher_is_better=False).tolist() == [3, 0, 7.5]


def test_a_rivals_items_stand_in_the_shared_order_however_they_were_scored() -> None:
    indices = np.random.default_rng(1).permutation(50)
    scored = Items(indices * 2.0, np.ones(50), (indices + 100).astype(np.uint64), indices)
    ordered = in_item_order(scored, seed=3)
    assert ordered.item.tolist() == item_order(50, 3).tolist()
    assert ordered.numerator.tolist() == (2.0 * ordered.item).tolist()
    assert ordered.cluster.tolist() == (ordered.item + 100).tolist()


def test_a_level_outside_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"level must be between 0 and 1, got 1\.0"):
        is_dominated([1.0], [0.0], 1.0)
