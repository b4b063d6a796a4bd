"""The conformance suite of the table of architectures: every family's parts lie where its line says."""

from typing import Any

import pytest
import torch
from families import CASES, HEADS, KNOWN, STRANGERS, TWO_HEADS, UNITS, VOCAB, WIDTH, random_model
from transformers.pytorch_utils import Conv1D

from raysearch.models.architectures import ARCHITECTURES, architecture, attention_heads, shape
from raysearch.models.compact import compact


def rows(linear: Any) -> torch.Tensor:
    """[outputs, inputs], a view to write to."""
    return linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(24).view(2, 12) % VOCAB).logits


def test_every_line_of_the_table_is_tested() -> None:
    assert set(KNOWN) == set(ARCHITECTURES)


@pytest.mark.parametrize("family", CASES)
def test_a_head_that_is_masked_in_its_output_is_cut_without_a_change(family: str) -> None:
    model = random_model(CASES[family]())
    known = architecture(model)
    for heads in attention_heads(model, known):
        rows(model.get_submodule(heads.path).get_submodule(heads.output))[:, heads.read_by[1]] = 0
        assert heads.num_heads == (2 if family in TWO_HEADS else HEADS)
    before = logits(model)
    cut = compact(model)
    assert cut.num_heads == 2  # one in each of two blocks
    assert torch.allclose(logits(model), before, atol=2e-5, rtol=1e-4)
    model.generate(torch.arange(8)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("family", CASES)
def test_only_its_own_head_hears_of_the_inputs_of_a_head(family: str) -> None:
    """Other rows of the queries, keys and values of head 0 change nothing but what its output's columns read."""
    model = random_model(CASES[family]())
    known = architecture(model)
    for heads in attention_heads(model, known):
        module = model.get_submodule(heads.path)
        rows(module.get_submodule(heads.output))[:, heads.read_by[0]] = 0
    before = logits(model)
    for heads in attention_heads(model, known):
        for path, of_head in heads.inputs:
            matrix = model.get_submodule(heads.path).get_submodule(path)
            rows(matrix)[of_head[0].reshape(-1)] = 0.123
            if matrix.bias is not None:
                matrix.bias.data[of_head[0].reshape(-1)] = 0.123
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", CASES)
def test_dead_neurons_are_cut_without_a_change(family: str) -> None:
    model = random_model(CASES[family]())
    known = architecture(model)
    for block in model.get_submodule(known.blocks):
        mlp = block.get_submodule(known.mlp.module)
        assert shape(getattr(mlp, known.mlp.last)) == (WIDTH, UNITS)
        rows(getattr(mlp, known.mlp.last))[:, :70] = 0
    before = logits(model)
    assert compact(model).num_units == 2 * 64  # 58 live, filled up to a multiple of 64
    assert torch.allclose(logits(model), before, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", STRANGERS)
def test_a_family_that_is_not_known_is_left_as_it_is(family: str) -> None:
    model = random_model(STRANGERS[family]())
    assert architecture(model) is None
    lines = []
    assert compact(model, lines.append) == (0, 0, 0)
    assert lines == [f"left dense: dead heads and neurons stay in, for those of {family} are not known"]


def test_a_model_whose_logits_would_change_is_left_as_it_is() -> None:
    """A family may change its code; here the model's activation is not what the table's name of it says."""
    model = random_model(KNOWN["gpt2"]())
    for block in model.transformer.h:
        rows(block.mlp.c_fc)[:70] = 0  # constant units, whose value is the activation of their bias
        forward = block.mlp.forward
        block.mlp.forward = lambda x, forward=forward: forward(x + 1)
        block.mlp.act.forward = lambda x, mlp=block.mlp: x.square() if x.ndim > 1 else x
    weights, before = {name: id(parameter) for name, parameter in model.named_parameters()}, logits(model)
    lines = []
    assert compact(model, lines.append) == (0, 0, 0)
    assert lines == ["left dense: dead heads and neurons stay in, for without them the model gives other logits"]
    assert weights == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert torch.equal(logits(model), before)
