"""The learning rate's path, and fine-tuning on a real engine."""

import itertools

import pytest

from raysearch.config import Action
from raysearch.training.finetune import finetune, learning_rate_at
from raysearch.trial.worker import Worker

TOKENS = 64 * 16


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [learning_rate_at(step, 1000, 2.0, 100) for step in range(1000)]
    assert rates[0] == 0.02
    assert max(rates) == rates[99] == rates[100] == 2.0
    assert rates[-1] == pytest.approx(0.2, rel=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert learning_rate_at(0, 1, 2.0, 0) == 2.0


def test_fine_tuning_lowers_the_loss(worker: Worker) -> None:
    worker.engine.load_base()
    worker.loaded_key = None
    losses, steps = [], []
    for start in (0, 16 * TOKENS):
        worker.engine.restart(0.0)
        action = Action(sparsity=0.0, finetune_tokens=16 * TOKENS, learning_rate=3e-3, data_start_tokens=start)
        losses.append(finetune(worker.engine, worker.inputs.blocks, action, 0.1, steps.append))
    assert losses[1] < losses[0] - 0.1
    assert steps == [*range(1, 65)] * 2
