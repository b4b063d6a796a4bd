"""The loss inside the forward: the operations, and so the bits, of transformers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from raysearch.training.loss import next_token_loss, take_loss

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES: dict[str, Callable[[], Any]] = {  # logits are the head of the hidden states; they are capped; not in the table
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)),
    "gemma2": lambda: AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)),
}


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_loss_that_transformers_gives(family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().train()
    tokens = torch.randint(64, (3, 20))
    wanted = model(input_ids=tokens, labels=tokens).loss
    wanted_gradients = gradients(model, wanted)
    take_loss(model)
    loss = model(input_ids=tokens, loss=next_token_loss)
    assert torch.equal(loss, wanted)
    for name, gradient in gradients(model, loss).items():
        assert torch.equal(gradient, wanted_gradients[name]), name


def test_gpt2_too_and_without_a_loss_nothing_changed(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    tokens = torch.arange(60).view(3, 20)
    wanted = model(input_ids=tokens, labels=tokens)
    take_loss(model)
    assert torch.equal(model(input_ids=tokens, loss=next_token_loss), wanted.loss)
    again = model(input_ids=tokens, labels=tokens)
    assert torch.equal(again.loss, wanted.loss)
    assert torch.equal(again.logits, wanted.logits)
    assert model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (3, 7)


def test_a_loss_of_ones_own_gets_hidden_states_and_head(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    take_loss(model)
    tokens = torch.arange(20).view(1, 20)
    seen = {}

    def loss(hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> torch.Tensor:
        seen.update(hidden=hidden.shape, logits=head(hidden[:, -1]).shape, tokens=given)
        return hidden.sum()

    model(input_ids=tokens, loss=loss)
    assert (seen["hidden"], seen["logits"]) == ((1, 20, model.config.n_embd), (1, model.config.vocab_size))
    assert torch.equal(seen["tokens"], tokens)
