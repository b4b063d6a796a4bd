"""Contributions of blocks against cosines, and activations of units against squares, in loops."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysearch.config import Action
from raysearch.models.architectures import layout
from raysearch.pruning.patterns import heads, neurons
from raysearch.trial.contribution import activations, contributions
from raysearch.trial.pruner import Pruner
from raysearch.trial.round import dense_round, load_candidate
from raysearch.trial.worker import Worker

ACTION = Action(criterion="contribution", pattern="layer", sparsity=0.5, calibration_sequences=3)


def test_what_is_most_like_its_input_goes(worker: Worker) -> None:
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    engine = worker.engine
    model = AutoModelForCausalLM.from_pretrained(worker.study.model.path).eval()
    cosines: list[list[float]] = [[], []]
    for tokens in worker.inputs.blocks.stream(0, 3, 0):
        hidden = []
        for block in model.transformer.h:
            block.register_forward_hook(lambda _, inputs, output, hidden=hidden: hidden.append((inputs[0][0], output[0])))
        with torch.no_grad():
            model(tokens[None])
        for layer, (before, after) in enumerate(hidden[:2]):
            for one, other in zip(before, after.view_as(before)):
                cosines[layer].append(float(one @ other / one.norm() / other.norm()))
    wanted = [-sum(each) / len(each) for each in cosines]
    assert contributions(engine, ACTION, worker.inputs.blocks).tolist() == pytest.approx(wanted, abs=1e-5)
    Pruner(engine, ACTION, 0, worker.inputs.blocks).begin()
    gone = wanted.index(min(wanted))
    for name in engine.shapes:
        if ".h." in name and "ln_" not in name:
            assert bool(engine.gather(name).any()) == (f".h.{gone}." not in name), name
    engine.restart(0.0)


@pytest.mark.parametrize(("pattern", "reader", "size"), [("neuron", "mlp.c_proj", 1), ("head", "attn.c_proj", None)])
def test_what_gives_least_goes(worker: Worker, pattern: str, reader: str, size: int | None) -> None:
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    engine, wanted = worker.engine, []
    model = AutoModelForCausalLM.from_pretrained(worker.study.model.path).eval()
    size = size or model.config.n_embd // model.config.n_head
    for block in model.transformer.h:
        given: list[torch.Tensor] = []
        module = block.get_submodule(reader)
        hook = module.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0][0]))
        with torch.no_grad():
            for tokens in worker.inputs.blocks.stream(0, 3, 0):
                model(tokens[None])
        hook.remove()
        squares = [[sum(float(x) ** 2 for x in row[first:first + size]) / size for first in range(0, len(row), size)]
                   for each in given for row in each]
        of_unit = [sum(each) / len(squares) for each in zip(*squares)]
        norm = sum(each**2 for each in of_unit) ** 0.5
        wanted += [each / norm for each in of_unit]
    units = {"neuron": neurons, "head": heads}[pattern](layout(engine.model, engine.prunables))
    action = Action(criterion="activation", pattern=pattern, sparsity=0.5, calibration_sequences=3)
    found = activations(engine, action, worker.inputs.blocks, units)
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)
    Pruner(engine, action, 0, worker.inputs.blocks).begin()
    gone = {index for index, each in enumerate(wanted) if each < sorted(wanted)[len(wanted) // 2]}
    per_layer = len(wanted) // len(model.transformer.h)
    for layer in range(len(model.transformer.h)):
        rows = engine.gather(f"transformer.h.{layer}.{reader}.weight").view(per_layer, -1)
        assert {unit for unit in range(per_layer) if not rows[unit].any()} == {
            each - layer * per_layer for each in gone if each // per_layer == layer}
