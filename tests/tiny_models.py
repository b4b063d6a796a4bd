"""Random tiny models of four families, and text for them."""

from typing import Any

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

VOCAB = 300
CONTEXT = 96
FAMILIES = ("gpt2", "gpt_neox", "opt", "llama")


def story(number: int) -> str:
    """A different little story of about 900 characters for every number."""
    animals, colours = ["dog", "cat", "fox", "hen", "cow"], ["red", "old", "big", "sad", "wet", "low", "hot"]
    lines = []
    for n in range(number, number + 6):
        a, b, c = animals[n % 5], animals[(n // 5 + 1) % 5], colours[n % 7]
        lines.append(f"The {c} {a} of house {n} saw the {b} near the river. It ran over the hill, and the {b} followed "
                     f"the {a} home to house {n}. In the evening they slept near the fire, for the {c} night was cold.")
    return " ".join(lines)


def tiny_model(family: str, *, context: int = CONTEXT) -> Any:
    torch.manual_seed(0)
    shared = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": context}
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=context, **shared))
    elif family == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=64, rotary_pct=0.5, **wide, **shared))
    elif family == "opt":
        model = OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=16, **wide, **{
            key: value for key, value in shared.items() if key != "initializer_range"}, init_std=0.2))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=64, num_key_value_heads=2, **wide, **shared))
    else:
        raise ValueError(family)
    return model.eval()
