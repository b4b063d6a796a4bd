"""Contributions of blocks against cosines in loops."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysearch.config import Action
from raysearch.trial.contribution import contributions
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
