"""Random tiny models of four families and a tokenizer trained on a few sentences."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.conftest import story

VOCAB = 300
CONTEXT = 96
FAMILIES = ("gpt2", "gpt_neox", "opt", "llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([story(n) for n in range(8)], trainers.BpeTrainer(
        vocab_size=VOCAB, show_progress=False, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>", bos_token="<|endoftext|>",
                                   pad_token="<|endoftext|>")


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


@pytest.fixture(params=FAMILIES)
def family_model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def gpt2() -> Any:
    return tiny_model("gpt2")
