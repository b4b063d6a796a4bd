"""Greedy generation gives the texts of lm-eval's Hugging Face backend, however many slots there are."""

from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_models import story

from raysearch.evaluation import Scorer


def reference(model: Any, tokenizer: Any) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")


@pytest.mark.parametrize("num_shots", [0, 1])
def test_generation_equals_lm_eval(family_model: Any, tokenizer: Any, num_shots: int) -> None:
    shots = "".join(f"{story(30 + n)[:70]}\n\n" for n in range(num_shots))
    settings: list[dict[str, Any]] = [{"until": ["e", "."], "max_gen_toks": 12}, {"until": ["zzz"], "max_gen_toks": 20},
                                      {"until": " ", "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}]
    requests = [Instance("generate_until", {}, (shots + story(n)[n:20 + 9 * n], settings[n % 3]), 0) for n in range(9)]
    got = Scorer(family_model, tokenizer, batch_tokens=100).generate_until(requests)
    assert got == reference(family_model, tokenizer).generate_until(requests, disable_tqdm=True)
    assert len(set(got)) > 4


def test_generation_refuses_sampling_and_too_many_tokens(gpt2: Any, tokenizer: Any) -> None:
    scorer = Scorer(gpt2, tokenizer)
    with pytest.raises(ValueError, match="generation is greedy"):
        scorer.generate_until([Instance("generate_until", {}, ("The", {"until": [], "do_sample": True}), 0)])
    with pytest.raises(ValueError, match="max_gen_toks must be less than the context of 96 tokens; got 96"):
        scorer.generate_until([Instance("generate_until", {}, ("The", {"until": [], "max_gen_toks": 96}), 0)])
