"""The paths against their end points, and torch's own one-cycle."""

import itertools

import pytest
import torch

from raysearch.training.learning_rate import learning_rate_at


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [learning_rate_at(step, 1000, 2.0, 100) for step in range(1000)]
    assert rates[0] == 0.02
    assert max(rates) == rates[99] == rates[100] == 2.0
    assert rates[-1] == pytest.approx(0.2, rel=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert learning_rate_at(0, 1, 2.0, 0) == 2.0


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 37, 100])
def test_the_other_schedules(num_steps: int) -> None:
    constant = [learning_rate_at(step, num_steps, 2.0, 2, "constant") for step in range(num_steps)]
    assert constant == [1.0, *[2.0] * (num_steps - 1)]
    found = [learning_rate_at(step, num_steps, 2.0, 2, "one_cycle") for step in range(num_steps)]
    assert all(0 < rate <= 2 for rate in found)
    if num_steps >= 10:  # below, torch divides by nothing
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        cycle, wanted = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.0, total_steps=num_steps), []
        for step in range(num_steps):
            wanted.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if step < num_steps - 1:
                cycle.step()
        assert found == pytest.approx(wanted, rel=1e-9)
