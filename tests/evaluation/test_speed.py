"""What is timed is what is said: all prompt tokens, single steps behind them, and every byte that a model holds once."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from families import KNOWN, random_model
from layers import mask_of
from transformers import GPT2Config, GPT2LMHeadModel

from raysearch.evaluation.attention import own_attention
from raysearch.evaluation.speed import _decoding, _scoring, resident_bytes, speeds
from raysearch.kernels import compress
from raysearch.models.architectures import shares_prefixes
from raysearch.models.compact import compact
from raysearch.models.sparse import SparseLinear


def model_of(width: int = 128) -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=width, n_layer=2, n_head=4)).eval()


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_scoring_and_decoding_are_those_of_the_model(family: str) -> None:
    """Scored in our own way and in transformers': the last logits, and the tokens that greedy generation gives."""
    model = random_model(KNOWN[family]())
    tokens = torch.ones(2, 6, dtype=torch.long)
    wanted = model.generate(tokens, attention_mask=tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    logits = model(tokens).logits[:, -1]
    with torch.no_grad(), own_attention(model) if shares_prefixes(model) else contextlib.nullcontext():
        assert torch.allclose(_scoring(model, 2, 6)(), logits, atol=1e-5)
        decoding = _decoding(model, 2, 6, 4)
        for _ in range(2):  # it begins anew
            decoding.begin()
            found = [decoding.advance() for _ in range(3)]
    if shares_prefixes(model):
        assert torch.equal(found[-1][:, -1], wanted[:, 9])
    else:
        assert found[-1].past_key_values.get_seq_length() == 9


def test_what_is_cut_is_faster_and_smaller() -> None:
    dense = model_of()
    served = copy.deepcopy(dense)
    for block in served.transformer.h:
        block.mlp.c_proj.weight.data[64:] = 0
    compact(served)
    one, other = speeds([dense, served], 2, 16, 4, num_rounds=3)
    gone = 2 * 4 * (448 * (2 * 128 + 1))  # of two blocks, fp32: rows, columns and biases
    assert (one.resident_bytes, other.resident_bytes) == (resident_bytes(dense), resident_bytes(dense) - gone)
    assert resident_bytes(dense) == 4 * sum(p.numel() for p in dense.parameters()) + sum(b.nbytes for b in dense.buffers())
    assert min(*one.model_dump().values(), *other.model_dump().values()) > 0


def test_a_prompt_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_tokens and new_tokens must be at most 64 together, .* got 60 and 5"):
        speeds([model_of()], 1, 60, 5)


def test_all_forms_of_a_sparse_layer_are_resident() -> None:
    pytest.importorskip("raysearch.kernels.cpu").library()
    model = model_of()
    before, (outputs, inputs) = resident_bytes(model), (512, 128)
    weight = torch.randn(outputs, inputs) * mask_of("unstructured", 1, (outputs, inputs), 0.9)
    sparse = compress(weight, weight != 0)
    layer = model.transformer.h[0].mlp.c_fc = SparseLinear(sparse, torch.zeros(outputs), dense=weight)
    packed = sum(part.nbytes for each in layer.packed.values() for part in each if torch.is_tensor(part))
    assert packed > 0
    assert resident_bytes(model) == before + sparse.num_bytes + packed
