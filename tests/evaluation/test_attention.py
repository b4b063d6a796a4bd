"""Our attention gives transformers' numbers on every family, with a mask, with a cache, and leaves no trace."""

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, tiny_model
from torch import Tensor

from raysearch.evaluation.attention import additive, attending, own_attention

TOKENS = torch.arange(3, 27).view(2, 12) % VOCAB
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""fp32 rounds at 2^-24 = 6e-8; two layers of width 32 add up some dozens of such errors, and logits are a few units."""


@torch.no_grad()
def test_causal_attention_is_that_of_transformers(family_model: Any) -> None:
    exact = family_model(TOKENS).logits
    with own_attention(family_model), attending(None):
        assert torch.allclose(family_model(TOKENS, use_cache=False).logits, exact, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])  # whose positions come from its own mask
def test_a_mask_hides_what_it_says(family: str) -> None:
    """Two texts in one row, each of which sees only itself, are scored as if they were alone."""
    model = tiny_model(family)
    place, text = torch.arange(24), torch.arange(24) // 12
    visible = (text[:, None] == text) & (place[:, None] >= place)
    exact = model(TOKENS).logits
    with own_attention(model), attending(additive(visible, torch.float32)[None, None]):
        logits = model(TOKENS.view(1, 24), use_cache=False, position_ids=(place % 12)[None]).logits
    assert torch.allclose(logits.view(2, 12, -1), exact, **CLOSE)


@torch.no_grad()
def test_new_tokens_attend_to_the_keys_that_a_cache_gives(gpt2: Any) -> None:
    exact = gpt2(TOKENS).logits
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        before = cache.get(layer)
        cache[layer] = (key, value) if before is None else tuple(torch.cat(both, dim=2) for both in zip(before, (key, value)))
        return cache[layer]

    positions = torch.arange(12)
    with own_attention(gpt2):
        with attending(None, extend):
            gpt2(TOKENS[:, :8], use_cache=False, position_ids=positions[None, :8])
        visible = positions <= positions[8:, None]
        with attending(additive(visible, torch.float32)[None, None], extend):
            last = gpt2(TOKENS[:, 8:], use_cache=False, position_ids=positions[None, 8:]).logits
    assert torch.allclose(last, exact[:, 8:], **CLOSE)


def test_the_model_has_its_own_attention_back_after_an_error(gpt2: Any) -> None:
    before = gpt2.config._attn_implementation
    with pytest.raises(RuntimeError, match="boom"), own_attention(gpt2):
        assert gpt2.config._attn_implementation == "raysearch" != before
        raise RuntimeError("boom")
    assert gpt2.config._attn_implementation == before


def test_hidden_places_get_the_lowest_number() -> None:
    visible = torch.tensor([[True, False]])
    for dtype in (torch.float32, torch.bfloat16):
        assert additive(visible, dtype).tolist() == [[0.0, torch.finfo(dtype).min]]
