"""The model of rounds, on functions that are known."""

import numpy as np
import pytest

from raysearch.config import Action
from raysearch.search import round_model
from raysearch.search.round_model import RoundModel, Start, Step


def steps(num: int, seed: int = 0) -> list[Step]:
    """Of two criteria, learning rates over two decades, with and without L1."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        before = chance.uniform(0, 0.8)
        after = float(1 - (1 - before) * (1 - chance.uniform(0, 0.5)))
        made.append((Start(before, np.array([1 - before, 1 + before])), Action(
            sparsity=after, criterion=str(chance.choice(["magnitude", "wanda"])),
            learning_rate=float(10 ** chance.uniform(-4, -2)), l1_lambda=float(chance.choice([0.0, 1e-4, 1e-3])),
            finetune_tokens=1024, seed=int(chance.integers(100)))))
    return made


def truth(each: list[Step]) -> np.ndarray:
    """A size that the sparsity says, and a quality of every field."""
    return np.array([[1 - action.sparsity, 1 + action.sparsity**2 + 0.2 * (action.criterion == "wanda")
                      + 0.1 * np.log10(action.learning_rate / 1e-3) ** 2 + 0.1 * (action.l1_lambda > 0)] for _, action in each])


def test_it_predicts_rounds_that_it_has_not_seen_and_knows_what_it_does_not_know() -> None:
    seen, held, model = steps(80), steps(50, seed=1), RoundModel()
    chance = np.random.default_rng(2)
    model.fit(seen, truth(seen) + [0.0, 0.01] * chance.standard_normal((80, 2)))
    mean, deviation = model(held)
    away, spread = np.abs(mean - truth(held)), truth(held).std(axis=0)
    assert (np.sqrt((away**2).mean(axis=0)) < [0.02, 0.15] * spread).all()
    assert (away[:, 1] < 3 * deviation[:, 1]).mean() > 0.95
    start, action = held[0]
    _, far = model([(start, action.model_copy(update={"learning_rate": 1.0}))])
    assert far[0, 1] > 3 * deviation[0, 1]


def test_a_field_or_a_choice_that_never_differed_has_no_say() -> None:
    seen, model = steps(30), RoundModel()
    model.fit(seen, truth(seen))
    start, action = seen[0]
    other = action.model_copy(update={"finetune_tokens": 4096, "seed": 7, "data_start_tokens": 512, "pattern": "2:4"})
    for one, two in zip(model([(start, action)]), model([(start, other)])):
        assert one == pytest.approx(two)


def test_with_a_threshold_the_sparsity_is_learned_too() -> None:
    chance = np.random.default_rng(0)
    seen = [(Start(0.0, np.array([1.0, 1.0])), Action(threshold=float(cut))) for cut in chance.uniform(0.1, 1.5, 30)]
    model = RoundModel()
    model.fit(seen, np.array([[np.exp(-action.threshold), 1.0 + action.threshold] for _, action in seen]))
    mean, _ = model([(Start(0.0, np.array([1.0, 1.0])), Action(threshold=0.7))])
    assert mean[0] == pytest.approx([np.exp(-0.7), 1.7], abs=0.01)


def test_lengths_are_kept_until_there_are_more_rounds_and_the_newest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_model, "MAX_ROUNDS", 40)
    model, seen = RoundModel(), steps(60)
    model.fit(seen[:20], truth(seen[:20]))
    kernels = model._kernels
    model.fit(seen[:25], truth(seen[:25]))
    assert model._kernels is kernels
    model.fit(seen[:26], truth(seen[:26]))
    assert model._kernels is not kernels
    model.fit(seen, truth(seen))
    assert [len(each.X_train_) for each in model._fitted] == [40, 40]
