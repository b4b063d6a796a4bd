"""LayerDrop against a model without the layers, step by step; and only vectors trained. Stages and ranks: test_pruner.py."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysearch.config import Action
from raysearch.trial.pruner import Pruner
from raysearch.trial.round import dense_round, load_candidate, run_round
from raysearch.trial.worker import Worker

RATE, SEED = 1e-3, 7


def test_a_round_is_written_out(worker: Worker, tiny_model: Path) -> None:
    """Hooks hand on what a layer gets. Losses of all steps, and the weights in the end, when all layers are back."""
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    engine = worker.engine
    engine.restart(0.0)
    pruner = Pruner(engine, Action(sparsity=0.0, layer_drop=0.5, finetune_tokens=256, seed=SEED), 6)
    pruner.begin()
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    draws = torch.Generator().manual_seed(SEED)
    dropped: list[bool] = [False, False]
    for index, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda _, x, y, index=index: (x[0] if dropped[index] else y))
    mean, square = ({name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(2))
    drawn = []
    for step in range(1, 7):
        tokens = worker.inputs.blocks.stream(4 * step, 4, 0)
        dropped[:] = (torch.rand(2, generator=draws) < 0.5).tolist()
        drawn.append(tuple(dropped))
        loss = engine.train_step(tokens, RATE)
        pruner.after_step(step)
        model.zero_grad()
        wanted = model(input_ids=tokens, labels=tokens).loss
        assert float(loss) == pytest.approx(wanted.item(), rel=1e-4), step
        wanted.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = (torch.zeros_like(p) if p.grad is None else p.grad) * float(engine.optimizer.clip_factor)
                mean[name], square[name] = 0.9 * mean[name] + 0.1 * g, 0.95 * square[name] + 0.05 * g**2
                p -= RATE * (mean[name] / (1 - 0.9**step)) / ((square[name] / (1 - 0.95**step)).sqrt() + 1e-8)
    assert len(set(drawn)) > 2  # one, another, both or none
    pruner.end()
    module = dict(engine.model.named_parameters())
    far = {name: int((~torch.isclose(module[name], p, atol=2e-4)).sum()) for name, p in model.named_parameters()}
    assert sum(far.values()) <= 40, far  # keys' biases have no gradient, and Adam makes steps of its rounding
    engine.restart(0.0)


def test_only_vectors_are_trained(worker: Worker) -> None:
    pruned = run_round(worker, dense_round(worker), Action(sparsity=0.5, scope="layer"))
    before = {name: worker.engine.gather(name).clone() for name in worker.engine.shapes}
    tuned = run_round(worker, pruned, Action(sparsity=0.5, scope="layer", finetune_tokens=2048, learning_rate=1e-2,
                                             trainable="vectors"))
    changed = {name for name, weights in before.items() if not torch.equal(worker.engine.gather(name), weights)}
    assert changed == {name for name, shape in worker.engine.shapes.items() if len(shape) == 1}
    assert tuned.sparsity == pruned.sparsity
    assert tuned.metrics["text/bits_per_byte"].value < pruned.metrics["text/bits_per_byte"].value
