"""Taylor scores against Hugging Face's own gradients, one sequence after the other, in loops."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysearch.config import Action
from raysearch.models.architectures import layout
from raysearch.pruning.patterns import PATTERNS
from raysearch.trial.first_order import first_order
from raysearch.trial.pruner import Pruner
from raysearch.trial.round import dense_round, load_candidate
from raysearch.trial.worker import Worker

ACTION = Action(criterion="taylor", sparsity=0.5, calibration_sequences=3)


@pytest.fixture
def products(worker: Worker, tiny_model: Path) -> list[dict[str, torch.Tensor]]:
    """w * dL/dw of each sequence."""
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    model, found = AutoModelForCausalLM.from_pretrained(tiny_model).train(), []
    for tokens in worker.inputs.blocks.stream(0, 3, 0):
        model.zero_grad()
        model(input_ids=tokens[None], labels=tokens[None]).loss.backward()
        found.append({name: p.detach() * p.grad for name, p in model.named_parameters()})
    return found


def test_each_weights_score_is_the_sum_of_sizes_over_sequences(worker: Worker, products: list) -> None:
    engine = worker.engine
    before = {name: engine.gather(name).clone() for name in engine.shapes}
    engine.restart(0.0, distill_alpha=1.0)  # the loss of the round to come is none of it: at the dense model it has no gradient
    first_order(engine, ACTION, worker.inputs.blocks, None)
    for shard in engine.prunable_shards:
        wanted = sum(product[shard.name].abs() for product in products).flatten()
        assert torch.allclose(shard.of(engine.optimizer.gathered), wanted, rtol=1e-3, atol=1e-8), shard.name
    assert all(torch.equal(engine.gather(name), weights) for name, weights in before.items())
    assert not any(value.any() for state in engine.optimizer.state.values() for value in state.values())
    Pruner(engine, ACTION, 0, worker.inputs.blocks).begin()
    assert not engine.optimizer.gathered
    scores = torch.cat([sum(product[p.name].abs() for product in products).flatten() for p in engine.prunables])
    gone = torch.cat([~engine.gather_mask(p.name).flatten() for p in engine.prunables])
    wanted = torch.zeros_like(gone)
    wanted[scores.argsort()[:len(scores) // 2]] = True
    assert int((gone != wanted).sum()) <= 4  # near ties
    engine.restart(0.0)


@pytest.mark.parametrize("pattern", ["head", "neuron"])
def test_a_units_score_is_its_gates_gradient_over_its_layers_norm(worker: Worker, tiny_model: Path, pattern: str) -> None:
    """Michel's gates, and Molchanov's feature maps: real factors of 1 in the graph, one sequence after the other."""
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    engine, num = worker.engine, 2 if pattern == "head" else 128
    engine.restart(0.0)
    found = first_order(engine, ACTION, worker.inputs.blocks, PATTERNS[pattern](layout(engine.model, engine.prunables)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    gates = [torch.ones(num, requires_grad=True) for _ in range(2)]
    for block, gate in zip(model.transformer.h, gates):
        reader = block.attn.c_proj if pattern == "head" else block.mlp.c_proj
        reader.register_forward_pre_hook(lambda _, x, gate=gate: (x[0] * gate.repeat_interleave(x[0].shape[-1] // num),))
    wanted = torch.zeros(2, num)
    for tokens in worker.inputs.blocks.stream(0, 3, 0):
        loss = model(input_ids=tokens[None], labels=tokens[None]).loss
        wanted += torch.stack(torch.autograd.grad(loss, gates)).abs()
    wanted /= wanted.norm(dim=1, keepdim=True)
    assert torch.allclose(found.float(), wanted.flatten(), rtol=1e-3, atol=1e-5)
    engine.restart(0.0)
