"""The conformance suite of the table of architectures: every family's parts lie where its line says."""

from typing import Any

import pytest
import torch
import transformers as hf
from families import CASES, HEADS, KNOWN, OLD, STRANGERS, TWO_HEADS, UNITS, VOCAB, WIDTH, random_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from raysearch.models.architectures import ARCHITECTURES, architecture, attention_heads, layout, plain_mlps, shape
from raysearch.models.compact import Compaction, compact, cut_to, plain_config
from raysearch.models.model import prunable_parameters
from raysearch.pruning.patterns import layers

NO_OTHER_HEADS = {"gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "xglm", "stablelm", "bloom", "gpt_bigcode",
                  "gpt_bigcode of one query a head", "phi with norms of queries", "stablelm with norms of queries",
                  *(name for name in CASES if name.startswith("falcon"))}
"""Their configurations hold no size of a head apart from the hidden size."""


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


def dead(family: str, part: str) -> Any:
    """The model with half of the neurons or heads of each block, or its first block, masked."""
    model = random_model(CASES[family]())
    known = architecture(model)
    if part == "layer":
        block = model.get_submodule(known.blocks)[0]
        for names, last in ((known.attention, known.attention.output), (known.mlp, known.mlp.last)):
            for parameter in getattr(block.get_submodule(names.module), last).parameters():
                parameter.data.zero_()
    for _, mlp in plain_mlps(model, known) if part == "neuron" else ():
        rows(getattr(mlp, known.mlp.last))[:, :64] = 0
    for heads in attention_heads(model, known) if part == "head" else ():
        gone = heads.read_by[:heads.num_heads // 2].reshape(-1)
        rows(model.get_submodule(heads.path).get_submodule(heads.output))[:, gone] = 0
    return model


@pytest.mark.parametrize("part", ["neuron", "head", "layer"])
@pytest.mark.parametrize("family", CASES)
def test_what_is_left_is_an_ordinary_model_where_its_configuration_can_say_so(family: str, part: str) -> None:
    """Its weights in a model that is made of the configuration alone, and else of the shapes, give the masked logits."""
    model = dead(family, part)
    masked = logits(model)
    cut = compact(model)
    assert (cut.num_units, cut.num_heads, cut.num_layers) == {
        "neuron": (128, 0, 0), "layer": (0, 0, 1), "head": (0, 2 if family in TWO_HEADS else HEADS, 0)}[part]
    assert torch.allclose(logits(model), masked, rtol=0, atol=1e-5 * float(masked.abs().max()))
    config = plain_config(model)
    assert (config is None) == ((part == "head" and family in NO_OTHER_HEADS) or (family, part) == ("bloom", "neuron"))
    config = type(model.config).from_dict((config or model.config).to_dict())
    made = AutoModelForCausalLM.from_config(config).eval()
    if plain_config(model) is None:
        cut_to(made, cut.kept)
    made.load_state_dict(model.state_dict())
    assert torch.allclose(logits(made), masked, rtol=0, atol=1e-5 * float(masked.abs().max()))


def test_layers_stay_before_others_where_their_place_counts() -> None:
    """GPT-2 may divide a block's attention by its place; the first and the last of three blocks are dead."""
    model = random_model(hf.GPT2Config(**{**OLD, "n_layer": 3}, scale_attn_by_inverse_layer_idx=True))
    for index in (0, 2):
        for last in (model.transformer.h[index].attn.c_proj, model.transformer.h[index].mlp.c_proj):
            for parameter in last.parameters():
                parameter.data.zero_()
    masked = logits(model)
    cut = compact(model)
    assert cut.num_layers == 1
    made = AutoModelForCausalLM.from_config(model.config).eval()
    cut_to(made, cut.kept)
    made.load_state_dict(model.state_dict())
    assert torch.allclose(logits(made), masked, rtol=0, atol=1e-5 * float(masked.abs().max()))


@pytest.mark.parametrize("family", CASES)
def test_a_layer_without_its_matrices_hands_on_what_it_gets(family: str) -> None:
    """The masks of pattern layer on one of two blocks: the logits are those of the model that never had it."""
    model = random_model(CASES[family]())
    units = layers(layout(model, prunable_parameters(model, "matrices")))
    parameters = dict(model.named_parameters())
    for part in units.parts:
        parameters[part.name].data.view(len(part.rows), -1)[part.rows[:, None] + part.columns == 1] = 0
    masked = logits(model)
    known = architecture(model)
    del model.get_submodule(known.blocks)[1]
    model.config.num_hidden_layers = 1
    assert torch.allclose(logits(model), masked, rtol=0, atol=1e-5 * float(masked.abs().max()))


@pytest.mark.parametrize("family", STRANGERS)
def test_a_family_that_is_not_known_is_left_as_it_is(family: str) -> None:
    model = random_model(STRANGERS[family]())
    assert architecture(model) is None
    lines = []
    assert compact(model, lines.append) == Compaction(0, 0, 0)
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
    assert compact(model, lines.append) == Compaction(0, 0, 0)
    assert lines == ["left dense: dead heads and neurons stay in, for without them the model gives other logits"]
    assert weights == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert torch.equal(logits(model), before)
