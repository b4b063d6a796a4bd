"""Group lasso in a round: each unit is shrunk as one, and what reached 0 is gone whole. Stages and ranks: test_pruner.py."""

import pytest
import torch

from raysearch.config import Action
from raysearch.models.architectures import layout
from raysearch.pruning.patterns import PATTERNS
from raysearch.trial.pruner import Pruner
from raysearch.trial.round import dense_round, load_candidate
from raysearch.trial.worker import Worker

RATE = 1e-3


@pytest.mark.parametrize("pattern", ["head", "neuron", "layer"])
def test_a_step_is_written_out(worker: Worker, pattern: str) -> None:
    """Behind a step without it, from the same weights: every unit by a loop over its parts."""
    tokens = worker.inputs.blocks.stream(0, 4, 0)

    def after_a_step(strength: float) -> dict[str, torch.Tensor]:
        load_candidate(worker, dense_round(worker))
        worker.loaded_key = None
        worker.engine.restart(0.0)
        Pruner(worker.engine, Action(criterion="magnitude", pattern=pattern, sparsity=0.0, group_lambda=strength), 1).begin()
        worker.engine.train_step(tokens, RATE)
        return {name: worker.engine.gather(name).clone() for name in worker.engine.shapes}

    plain = after_a_step(0.0)
    units = PATTERNS[pattern](layout(worker.engine.model, worker.engine.prunables))
    parts = [(part.name, part.rows[:, None] + part.columns) for part in units.parts if not part.goes_along]
    squares, sizes = torch.zeros(len(units.group)), torch.zeros(len(units.group))
    for unit in range(len(units.group)):
        for name, of in parts:
            squares[unit] += plain[name][of == unit].square().sum()
            sizes[unit] += (of == unit).sum()
    rms = (squares / sizes).sqrt()
    strength = float(rms.sort().values[len(rms) // 2 - 1]) * 1.0001 / RATE  # half of the units fall to 0
    found = after_a_step(strength)
    for name, of in parts:
        factor = torch.where(rms <= RATE * strength, 0, 1 - RATE * strength / rms)[of.clamp(min=0)]
        wanted = plain[name] * torch.where(of >= 0, factor, 1.0)
        assert torch.allclose(found[name], wanted, atol=1e-6), name
    untouched = set(plain) - {name for name, _ in parts}
    assert all(torch.equal(found[name], plain[name]) for name in untouched)
    gone = [unit for unit in range(len(units.group)) if all(not found[name][of == unit].any() for name, of in parts)]
    assert gone == (rms <= RATE * strength).nonzero().flatten().tolist()
    assert len(gone) - len(rms) // 2 in (0, 1)
    worker.engine.settle_masks()
    worker.engine.restart(0.0)
    kept = worker.engine.kept_counts()
    assert sum(kept[p.name] for p in worker.engine.prunables) == sum(
        int(found[p.name].count_nonzero()) for p in worker.engine.prunables)
