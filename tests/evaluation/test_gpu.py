"""The scorer on a GPU: graphs, asynchronous batches and fused attention change no number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_scorer import assert_same, choices, pair
from tiny_models import story, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from raysearch.evaluation import Scorer, graphs
from raysearch.evaluation.generation import Slots

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_matrix_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def reference(model: Any, tokenizer: Any) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cuda", softmax_dtype="float32")


def questions(num: int) -> list[Instance]:
    settings = {"until": ["e", "."], "max_gen_toks": 21}
    shot = f"{story(30)[:60]}\n\n"
    return [Instance("generate_until", {}, (shot + story(n)[n % 7:8 + 2 * (n % 11)], settings), 0) for n in range(num)]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama"])
def test_scores_equal_lm_eval_and_the_cpu(family: str, tokenizer: Any) -> None:
    requests = choices(1) + [pair(story(n)[:50], story(n)[50:52]) for n in range(6)]
    on_cpu = Scorer(tiny_model(family), tokenizer).loglikelihood(requests)
    model = tiny_model(family).cuda()
    got = Scorer(model, tokenizer, batch_tokens=512).loglikelihood(requests)
    assert_same(got, reference(model, tokenizer).loglikelihood(requests, disable_tqdm=True))
    assert_same(got, on_cpu)


def test_graphs_that_are_garbage_do_not_break_a_capture() -> None:
    def forward(is_chain: bool, values: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            [[] for _ in range(5_000)]  # as many as make Python collect garbage
        return values + 1

    def captured() -> graphs.Graphs:
        of_forward = graphs.Graphs(forward)
        of_forward._seen["captured",] = of_forward._capture(False, (torch.zeros(3, device="cuda"),))
        return of_forward

    garbage: list[Any] = [captured()]
    garbage.append(garbage)
    del garbage
    assert captured()._seen["captured",].replay((torch.ones(3, device="cuda"),)).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama"])
def test_graphs_score_what_eager_batches_score(family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "HOST_BOUND", 0.0)  # every shape is captured at its second batch
    model = tiny_model(family).cuda()
    requests = choices(0) + choices(1) + [pair(story(n)[:50], story(n)[50:52]) for n in range(6)]
    eager = Scorer(model, tokenizer, batch_tokens=512, graphs=False)
    scorer = Scorer(model, tokenizer, batch_tokens=512)
    assert scorer._graphs is not None
    for _ in range(4):
        assert_same(scorer.loglikelihood(requests), eager.loglikelihood(requests))
    num_captured = scorer._graphs.num_captured
    assert num_captured == len(scorer._graphs._seen)
    assert num_captured > 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)  # in place, as the engine does: the graphs stay
    assert_same(scorer.loglikelihood(requests), eager.loglikelihood(requests))
    assert scorer._graphs.num_captured == num_captured


def test_replaced_modules_and_moved_weights_drop_the_graphs(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "HOST_BOUND", 0.0)
    model = tiny_model("gpt2").cuda()
    scorer, requests = Scorer(model, tokenizer, batch_tokens=512), choices(0)
    before = [scorer.loglikelihood(requests) for _ in range(2)]
    assert scorer._graphs is not None
    assert scorer._graphs.num_captured
    wide = model.transformer.h[0].mlp.c_fc
    replaced = torch.nn.Linear(32, 128).cuda()
    replaced.weight.data, replaced.bias.data = wide.weight.data.T.contiguous(), wide.bias.data.clone()
    model.transformer.h[0].mlp.c_fc = replaced  # what sparsify_for_inference does
    for _ in range(3):
        assert_same(scorer.loglikelihood(requests), before[0])
    replaced.weight.data = replaced.weight.data * 2
    changed = Scorer(model, tokenizer, batch_tokens=512, graphs=False).loglikelihood(requests)
    assert max(abs(a[0] - b[0]) for a, b in zip(changed, before[0])) > 1e-3
    assert_same(scorer.loglikelihood(requests), changed)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama"])
def test_graphs_generate_what_eager_steps_and_lm_eval_generate(family: str, tokenizer: Any,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family).cuda()
    requests = questions(60)
    captured: list[Slots] = []
    run = Slots.run
    monkeypatch.setattr(Slots, "run", lambda self, *args, **options: (captured.append(self), run(self, *args, **options))[1])
    with_graphs = Scorer(model, tokenizer, batch_tokens=200).generate_until(requests)
    assert any(isinstance(graph, torch.cuda.CUDAGraph) for graph in captured[0].captured.values())
    init = Slots.__init__
    monkeypatch.setattr(Slots, "__init__", lambda self, *args, **options: init(self, *args, **{**options, "graphs": False}))
    assert Scorer(model, tokenizer, batch_tokens=200).generate_until(requests) == with_graphs
    assert reference(model, tokenizer).generate_until(requests, disable_tqdm=True) == with_graphs


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama"])
def test_a_batch_never_waits_for_the_gpu(family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(tiny_model(family).cuda(), tokenizer, batch_tokens=512, graphs=False)  # a capture may wait
    expected = scorer.loglikelihood(choices(0))  # kernels are loaded
    score_batch: Callable[..., torch.Tensor] = Scorer._score_batch

    def strict(*args: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return score_batch(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Scorer, "_score_batch", strict)
    assert_same(scorer.loglikelihood(choices(0)), expected)


def test_bf16_is_as_near_to_fp32_as_lm_eval(tokenizer: Any) -> None:
    requests = choices(0)
    exact = Scorer(tiny_model("llama").cuda(), tokenizer).loglikelihood(requests)
    model = tiny_model("llama").cuda().bfloat16()
    backend = reference(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    ours = Scorer(model, tokenizer).loglikelihood(requests)
    errors = [max(abs(a[0] - b[0]) for a, b in zip(answers, exact)) for answers in (ours, backend)]
    assert errors[0] < 1.5 * errors[1] + 1e-2


def test_memory_holds_the_logits_of_scored_positions_only(tokenizer: Any) -> None:
    vocab, batch_tokens = 50_257, 32_768
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=64, n_layer=1, n_head=1, n_positions=512))
    scorer = Scorer(model.cuda().bfloat16().eval(), tokenizer, batch_tokens=batch_tokens)
    pairs = [(tuple(range(n, n + 500)), (7, 8)) for n in range(256)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scorer.score(pairs)
    all_logits = batch_tokens * vocab * 2
    assert torch.cuda.max_memory_allocated() - before < 0.2 * all_logits
