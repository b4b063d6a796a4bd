"""Compaction cuts out exactly what is dead and changes no output."""

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from raysearch.models.compact import Compaction, compact

HEADS, SIZE, WIDTH, UNITS = 4, 8, 32, 256


def model(family: str) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
              "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    made = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=HEADS,
                                                   n_inner=UNITS, bos_token_id=0, eos_token_id=0)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=UNITS, **common)),
        "opt": lambda: OPTForCausalLM(OPTConfig(ffn_dim=UNITS, word_embed_proj_dim=WIDTH, pad_token_id=1, **common)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(intermediate_size=UNITS, num_key_value_heads=2, **common)),
    }[family]().eval().double()
    for parameter in made.parameters():  # biases are zero at first, and would hide a constant that is lost
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return made


def rows(linear: Any) -> torch.Tensor:
    """[outputs, inputs], a view to write to."""
    return linear.weight.data.T if "Conv1D" in type(linear).__name__ else linear.weight.data


def parts(made: Any, family: str) -> tuple[Any, Any, Any, Any, Any]:
    """First and second matrix of an MLP; the values, their first row for head 1, and the output of its attention."""
    if family == "gpt2":
        block = made.transformer.h[1]
        return block.mlp.c_fc, block.mlp.c_proj, block.attn.c_attn, 2 * WIDTH + SIZE, block.attn.c_proj
    if family == "gpt_neox":
        block = made.gpt_neox.layers[1]
        return (block.mlp.dense_h_to_4h, block.mlp.dense_4h_to_h, block.attention.query_key_value, 3 * SIZE + 2 * SIZE,
                block.attention.dense)
    if family == "opt":
        block = made.model.decoder.layers[1]
        return block.fc1, block.fc2, block.self_attn.v_proj, SIZE, block.self_attn.out_proj
    block = made.model.layers[1]
    return block.mlp.up_proj, block.mlp.down_proj, block.self_attn.v_proj, SIZE, block.self_attn.o_proj


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama"])
def test_dead_units_and_heads_go_and_the_outputs_stay(family: str, device: str) -> None:
    made = model(family).to(device)
    first, second, values, row, output = parts(made, family)
    rows(first)[:100] = 0  # constant units
    rows(second)[:, 80:150] = 0  # units that nothing reads
    rows(values)[row:row + SIZE] = 0  # constant values of head 1 (of key-value head 1 in llama, so of queries 2 and 3)
    if family != "llama":
        rows(output)[:, 3 * SIZE:4 * SIZE] = 0  # nothing reads head 3
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1)).to(device)
    before = made(tokens).logits
    made_before = sum(parameter.numel() for parameter in made.parameters())
    cut = compact(made)
    assert torch.allclose(made(tokens).logits, before, rtol=1e-10, atol=1e-10)
    assert cut.num_units == 128  # 150 are dead, and 106 living ones are filled up to 128
    assert cut.num_heads == (1 if family == "llama" else 2)
    assert cut.num_parameters == made_before - sum(parameter.numel() for parameter in made.parameters()) > 0
    assert rows(second).shape == (WIDTH, 128)
    assert rows(output).shape == (WIDTH, 2 * SIZE)
    made.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert compact(made) == Compaction(0, 0, 0)


def test_a_model_without_dead_parts_is_left_alone() -> None:
    made = model("gpt2")
    weights = {name: id(parameter) for name, parameter in made.named_parameters()}
    assert compact(made) == Compaction(0, 0, 0)
    assert weights == {name: id(parameter) for name, parameter in made.named_parameters()}


def test_an_mlp_and_an_attention_that_are_dead_keep_one_part() -> None:
    made = model("gpt2")
    first, second, values, _, output = parts(made, "gpt2")
    rows(second).zero_()
    rows(output).zero_()
    tokens = torch.arange(10)[None]
    before = made(tokens).logits
    compact(made)
    assert torch.allclose(made(tokens).logits, before, rtol=1e-10, atol=1e-10)
    assert rows(first).shape == (64, WIDTH)
    assert rows(output).shape == (WIDTH, SIZE)


def test_a_constant_with_no_bias_to_go_to_stays() -> None:
    made = model("llama")
    _, _, values, row, output = parts(made, "llama")
    values.bias = torch.nn.Parameter(torch.ones(2 * SIZE, dtype=torch.float64))
    rows(values)[row:row + SIZE] = 0
    tokens = torch.arange(10)[None]
    before = made(tokens).logits
    assert compact(made).num_heads == 0
    assert torch.equal(made(tokens).logits, before)
