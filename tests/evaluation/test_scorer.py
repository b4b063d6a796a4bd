"""The scorer gives the numbers of lm-eval's Hugging Face backend, on every family, and on several ranks."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_models import CONTEXT, VOCAB, story, tiny_model
from transformers import MistralConfig, MistralForCausalLM

from raysearch.evaluation import Scorer
from raysearch.evaluation.packing import Layout

TOLERANCE = 1e-4
"""Sums of up to 96 fp32 log-probabilities of about -7 each: 1e-4 is 1e-7 relative, a rounding."""


def pair(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0)


def choices(num_shots: int) -> list[Instance]:
    shots = [story(20 + n)[:60] + "\n\n" for n in range(num_shots)]
    return [pair("".join(shots) + story(n)[:40 + n], " " + story(n + k)[60 + n:80 + n + 3 * k])
            for n in range(6) for k in range(4)]


def reference(model: Any, tokenizer: Any) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")


def assert_same(got: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in expected], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_shots", [0, 1, 3])
def test_loglikelihood_equals_lm_eval(family_model: Any, tokenizer: Any, num_shots: int) -> None:
    requests = choices(num_shots)
    got = Scorer(family_model, tokenizer, batch_tokens=512).loglikelihood(requests)
    assert_same(got, reference(family_model, tokenizer).loglikelihood(requests, disable_tqdm=True))


def test_prefixes_are_shared(gpt2: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = choices(1)
    scorer = Scorer(gpt2, tokenizer)
    layouts: list[Layout] = []
    score_batch = Scorer._score_batch
    monkeypatch.setattr(Scorer, "_score_batch", lambda self, layout, slices: (
        layouts.append(layout), score_batch(self, layout, slices))[1])
    scorer.loglikelihood(requests)
    plain = sum(len(context) + len(continuation) - 1 for context, continuation in scorer.encode_pairs(
        [request.args for request in requests]))
    assert sum(layout.tokens.size for layout in layouts) < 0.6 * plain


def test_logits_only_at_scored_positions(gpt2: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, ...]] = []
    gpt2.get_output_embeddings().register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape)))
    requests = [pair(story(n)[:150], story(n)[150:158]) for n in range(8)]
    scorer = Scorer(gpt2, tokenizer)
    scorer.loglikelihood(requests)
    scored = sum(len(continuation) for _, continuation in scorer.encode_pairs([request.args for request in requests]))
    assert sum(shape[0] for shape in seen) <= scored
    scorer._slice = 3
    small = scorer.loglikelihood(requests)
    assert max(shape[0] for shape in seen[1:]) == 3
    assert_same(small, reference(gpt2, tokenizer).loglikelihood(requests, disable_tqdm=True))


def test_greedy_continuations_are_recognised(family_model: Any, tokenizer: Any) -> None:
    context = tokenizer(story(3)[:50], return_tensors="pt")
    prompt = tuple(context["input_ids"][0].tolist())
    made = family_model.generate(**context, max_new_tokens=4, do_sample=False)[0, len(prompt):].tolist()
    wrong = (*made[:-1], (made[-1] + 1) % VOCAB)
    right, not_right = Scorer(family_model, tokenizer).score([(prompt, tuple(made)), (prompt, wrong)])
    assert right[1]
    assert not not_right[1]


@pytest.mark.parametrize("context", ["", " ", "The red dog ", "The red dog", "<|endoftext|>The red", "naïve  \n"])
@pytest.mark.parametrize("continuation", [" ran", "ran over", "<|endoftext|>ran", "  x"])
def test_tokens_equal_lm_eval(gpt2: Any, tokenizer: Any, context: str, continuation: str) -> None:
    seen: list[Any] = []
    backend = reference(gpt2, tokenizer)
    backend._loglikelihood_tokens = lambda requests, **_: seen.extend(requests)
    backend.loglikelihood([pair(context, continuation)], disable_tqdm=True)
    (_, head, tail), = seen
    assert Scorer(gpt2, tokenizer).encode_pairs([(context, continuation)]) == [(tuple(head), tuple(tail))]


def test_long_items_are_cut_as_lm_eval_cuts_them(family_model: Any, tokenizer: Any) -> None:
    requests = [pair(story(1) + story(2), story(3)[n:40 + n]) for n in range(3)] + [pair("The red", " dog")]
    scorer = Scorer(family_model, tokenizer)
    assert_same(scorer.loglikelihood(requests), reference(family_model, tokenizer).loglikelihood(requests, True))
    assert scorer.num_truncated == 3


def test_continuation_longer_than_the_context_keeps_its_end(gpt2: Any, tokenizer: Any) -> None:
    scorer = Scorer(gpt2, tokenizer)
    (whole, _), (end, _) = scorer.score([((5,), tuple(range(10, 10 + CONTEXT + 20))),
                                         ((29,), tuple(range(30, 10 + CONTEXT + 20)))])
    assert scorer.num_truncated == 1
    assert whole == pytest.approx(end, abs=TOLERANCE)


def test_rolling_equals_lm_eval(family_model: Any, tokenizer: Any) -> None:
    texts = [story(1), story(2) * 2, "The dog.", story(3)[:300], ""]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    got = Scorer(family_model, tokenizer, batch_tokens=200).loglikelihood_rolling(requests)
    expected = reference(family_model, tokenizer).loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(got, expected, rtol=3e-7, atol=TOLERANCE)


def test_other_architectures_take_the_plain_path(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, sliding_window=8, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, initializer_range=0.2)).eval()
    scorer = Scorer(model, tokenizer)
    assert not scorer.shares_prefixes
    requests = choices(1)
    assert_same(scorer.loglikelihood(requests), reference(model, tokenizer).loglikelihood(requests, disable_tqdm=True))


def test_bf16_stays_near_fp32(tokenizer: Any) -> None:
    requests = choices(0)
    exact = Scorer(tiny_model("llama"), tokenizer).loglikelihood(requests)
    rounded = Scorer(tiny_model("llama").bfloat16(), tokenizer).loglikelihood(requests)
    backend = HFLM(pretrained=tiny_model("llama").bfloat16(), tokenizer=tokenizer, batch_size=3, device="cpu",
                   softmax_dtype="float32")
    hf = backend.loglikelihood(requests, disable_tqdm=True)
    ours_error = max(abs(a[0] - b[0]) for a, b in zip(rounded, exact))
    hf_error = max(abs(a[0] - b[0]) for a, b in zip(hf, exact))
    assert ours_error < 1.5 * hf_error + 1e-2


def on_ranks(world_size: int, work: Callable[[int, Callable[[object], list[Any]]], Any]) -> list[Any]:
    """work(rank, gather) on threads; gather is an all_gather_object of the threads."""
    barrier, box, results = threading.Barrier(world_size, timeout=60), [None] * world_size, [None] * world_size

    def gather_on(rank: int) -> Callable[[object], list[Any]]:
        def gather(value: Any) -> list[Any]:
            box[rank] = value
            barrier.wait()
            everything = list(box)
            barrier.wait()
            return everything
        return gather

    def run(rank: int) -> None:
        results[rank] = work(rank, gather_on(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_work_and_all_get_everything(tokenizer: Any, world_size: int, lockstep: bool) -> None:
    requests = choices(1)
    questions = [Instance("generate_until", {}, (story(n)[:30 + 7 * n], {"until": ["e"], "max_gen_toks": 9}), 0)
                 for n in range(5)]
    alone = Scorer(tiny_model("gpt2"), tokenizer, batch_tokens=128)
    expected = alone.loglikelihood(requests), alone.generate_until(questions)

    def work(rank: int, gather: Callable[[object], list[Any]]) -> Any:
        model = tiny_models[rank]
        calls: list[str] = []
        for name, module in (("body", model.base_model), ("head", model.get_output_embeddings())):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        scorer = Scorer(model, tokenizer, batch_tokens=128, rank=rank, world_size=world_size, gather=gather,
                        lockstep=lockstep)
        scorer._slice = 5
        return scorer.loglikelihood(requests), scorer.generate_until(questions), calls

    tiny_models = [tiny_model("gpt2") for _ in range(world_size)]
    results = on_ranks(world_size, work)
    for logprobs, texts, _ in results:
        assert_same(logprobs, expected[0])
        assert texts == expected[1]
    if lockstep:
        assert all(calls == results[0][2] for _, _, calls in results)


def test_out_of_memory_halves_the_batch_and_warns_once(gpt2: Any, tokenizer: Any,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [pair(story(n)[:60], story(n)[60:70]) for n in range(9)]
    expected = reference(gpt2, tokenizer).loglikelihood(requests, disable_tqdm=True)
    score_batch = Scorer._score_batch

    def small_memory(self: Scorer, layout: Layout, slices: int) -> torch.Tensor:
        if len(layout.tokens) > 2:
            raise torch.OutOfMemoryError("too many rows")
        return score_batch(self, layout, slices)

    monkeypatch.setattr(Scorer, "_score_batch", small_memory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(Scorer(gpt2, tokenizer).loglikelihood(requests), expected)
    assert len([w for w in caught if "the batch is halved" in str(w.message)]) == 1


def test_deterministic_and_model_left_as_it_was(gpt2: Any, tokenizer: Any) -> None:
    gpt2.train()
    before = [type(module).__name__ for module in gpt2.modules()]
    scorer = Scorer(gpt2, tokenizer)
    assert scorer.loglikelihood(choices(0)) == scorer.loglikelihood(choices(0))
    assert gpt2.training
    assert [type(module).__name__ for module in gpt2.modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in gpt2.modules())


@pytest.mark.parametrize(("options", "message"), [
    ({"batch_tokens": 0}, "batch_tokens must be at least 1; got 0"),
    ({"world_size": 2}, "world_size 2 needs a `gather` function; got None"),
    ({"rank": 1}, r"rank must be in \[0, world_size=1\); got 1"),
])
def test_bad_settings(gpt2: Any, tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer(gpt2, tokenizer, **options)


def test_empty_continuation_is_refused(gpt2: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="at least 1 token of context and 1 of continuation; got 3 and 0"):
        Scorer(gpt2, tokenizer).score([((1, 2, 3), ())])


def test_a_continuation_without_a_token_names_task_and_item(gpt2: Any, tokenizer: Any) -> None:
    scorer = Scorer(gpt2, tokenizer)
    good, bad = (Instance("loglikelihood", {}, ("The dog", text), 0, ("hellaswag", item, 1))
                 for item, text in ((3, " ran"), (4, "")))
    with pytest.raises(ValueError, match="task hellaswag, item 4: its continuation must be at least one token, .* none"):
        scorer.loglikelihood([good, bad])
