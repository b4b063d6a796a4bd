"""Taylor scores against Hugging Face's own gradients, one sequence after the other, in loops."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysearch.config import Action
from raysearch.models.architectures import layout
from raysearch.pruning.patterns import heads
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


def test_a_heads_score_is_the_sum_of_sizes_of_its_sums_over_its_layers_norm(worker: Worker, products: list) -> None:
    engine = worker.engine
    engine.restart(0.0)
    found = first_order(engine, ACTION, worker.inputs.blocks, heads(layout(engine.model, engine.prunables)))
    width, wanted = engine.model.config.n_embd // 2, []
    for layer in range(2):
        total = [0.0, 0.0]
        for product in products:
            fused = product[f"transformer.h.{layer}.attn.c_attn.weight"].view(-1, 3, 2, width)
            output = product[f"transformer.h.{layer}.attn.c_proj.weight"].view(2, width, -1)
            for head in range(2):
                total[head] += abs(float(fused[:, :, head].sum() + output[head].sum()))
        wanted += [each / (total[0] ** 2 + total[1] ** 2) ** 0.5 for each in total]
    assert found.tolist() == pytest.approx(wanted, rel=1e-3)
    engine.restart(0.0)
