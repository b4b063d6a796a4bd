"""Tokens are those of lm-eval's own encoding, text by text."""

from pathlib import Path

import pytest
from lm_eval.api.model import TemplateLM
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raysearch.evaluation import encoding
from raysearch.evaluation.encoding import encode, encode_pairs

PAIRS = [("The dog", " ran home"), ("The dog ", "ran home"), ("", " ran"), ("", "<|endoftext|>ran"), ("<|endoftext|>A", " b"),
         ("  two  ", "  spaces")]


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


class Reference(TemplateLM):
    """lm-eval's pairs with the tokenizer called text by text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.backend = tokenizer, "causal"

    eot_token_id = prefix_token_id = 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        return self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]

    def _loglikelihood_tokens(self, requests: object, **kwargs: object) -> list:
        raise NotImplementedError

    loglikelihood_rolling = generate_until = _loglikelihood_tokens


def test_pairs_are_those_of_lm_eval(tokenizer: PreTrainedTokenizerBase) -> None:
    reference = Reference(tokenizer)
    for (context, continuation), (head, tail) in zip(PAIRS, encode_pairs(tokenizer, 0, PAIRS)):
        if context:
            wanted = reference._encode_pair(context, continuation)
            assert ([*head], [*tail]) == tuple(map(list, wanted))
        assert tokenizer.decode([*head, *tail]).removeprefix("<|endoftext|>") == (context + continuation).removeprefix(
            "<|endoftext|>")
        assert head


def test_a_text_is_encoded_once(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode(tokenizer, 0, ["a b", "a b", "c"])
    monkeypatch.setattr(encoding, "token_ids", None)
    assert encode(tokenizer, 0, ["c", "a b"]) == [first[2], first[0]]
