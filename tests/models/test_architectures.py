"""The conformance suite of the table of architectures: every family's parts lie where its line says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.pytorch_utils import Conv1D

from raysearch.models.architectures import ARCHITECTURES, architecture, attention_heads, shape
from raysearch.models.compact import compact

VOCAB, WIDTH, HEADS, UNITS = 96, 32, 4, 128
WIDE = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
OLD = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "bos_token_id": 0,
       "eos_token_id": 0}
GROUPED = {**WIDE, "intermediate_size": UNITS, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2Config(**OLD),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_layers=2, num_heads=HEADS, max_position_embeddings=64, intermediate_size=UNITS,
        attention_types=[[["global", "local"], 1]], window_size=8, bos_token_id=0, eos_token_id=0),
    "gptj": lambda: hf.GPTJConfig(**OLD, rotary_dim=4),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**WIDE, intermediate_size=UNITS, rotary_pct=0.5),
    "opt": lambda: hf.OPTConfig(**WIDE, ffn_dim=UNITS, word_embed_proj_dim=WIDTH),
    "xglm": lambda: hf.XGLMConfig(vocab_size=VOCAB, d_model=WIDTH, ffn_dim=UNITS, num_layers=2, attention_heads=HEADS,
                                  max_position_embeddings=64),
    "phi": lambda: hf.PhiConfig(**WIDE, intermediate_size=UNITS),
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "gemma": lambda: hf.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**GROUPED, head_dim=8),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=8),
    "stablelm": lambda: hf.StableLmConfig(**GROUPED),
    "cohere": lambda: hf.CohereConfig(**GROUPED),
    "granite": lambda: hf.GraniteConfig(**GROUPED),
    "olmo": lambda: hf.OlmoConfig(**GROUPED),
    "starcoder2": lambda: hf.Starcoder2Config(**GROUPED),
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=HEADS),
    "falcon": lambda: hf.FalconConfig(**WIDE),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**OLD),
}
VARIANTS = {
    "falcon 40b": lambda: hf.FalconConfig(**WIDE, new_decoder_architecture=True, num_kv_heads=2),
    "falcon with slopes": lambda: hf.FalconConfig(**WIDE, alibi=True, multi_query=False),
    "falcon of one query a head": lambda: hf.FalconConfig(**WIDE, multi_query=False, bias=True),
    "gpt_bigcode of one query a head": lambda: hf.GPTBigCodeConfig(**OLD, multi_query=False),
    "gemma with one key-value head": lambda: hf.GemmaConfig(**{**GROUPED, "num_key_value_heads": 1}, head_dim=8),
}
CASES = CONFIGS | VARIANTS
TWO_HEADS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "stablelm", "cohere", "granite", "olmo",
             "starcoder2", "falcon 40b"}
"""Two key-value heads, each with two queries."""
STRANGERS = {
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "mamba": lambda: hf.MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, state_size=8),
}


def random_model(config: Any) -> Any:
    """fp32, with weights and biases large enough that nothing is lost by chance."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def rows(linear: Any) -> torch.Tensor:
    """[outputs, inputs], a view to write to."""
    return linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(24).view(2, 12) % VOCAB).logits


def test_every_line_of_the_table_is_tested() -> None:
    assert set(CONFIGS) == set(ARCHITECTURES)


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
    model = random_model(CONFIGS["gpt2"]())
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
