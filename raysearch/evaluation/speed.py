"""How fast a model is served, and what it holds in memory, beside another one in the same process and in turn.

Scoring is one forward over B x P prompt tokens with the next token's logits of each sequence, decoding one new token for each
of B sequences with a cache. On a GPU both are CUDA graphs for the families that are scored by them (evaluation.Scorer),
so that the host's time is not measured; others run transformers' own forward.

Legend: B sequences, P tokens of each prompt, N new tokens of each.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raysearch.config import ServingSettings
from raysearch.evaluation.attention import KERNELS, attending, own_attention
from raysearch.evaluation.forward import following, fused_gelu, last_hidden
from raysearch.evaluation.generation import Slots
from raysearch.kernels.dispatch import time_in_turn
from raysearch.models.architectures import shares_prefixes
from raysearch.models.model import context_limit
from raysearch.models.sparse import SparseLinear, sparsify_for_inference
from raysearch.study.records import Served

NUM_ROUNDS = 20
"""Medians are taken of so many."""
WARM_ROUNDS = 2
"""Before them: a graph is captured at the second pass."""


def beside_dense(dense: Any, model: Any, serving: ServingSettings, say: Callable[[str], object]) -> tuple[Served, Served, str]:
    """(of the dense model, of the other one as it is served, cut down and, in place, on sparse kernels where those win, and
    what was done to it)."""
    done = sparsify_for_inference(model, num_tokens=serving.tokens_at_once, say=say)
    one, other = speeds([dense, model], **serving.model_dump())
    on_kernels = sorted({choice.backend for layer in done.layers for tokens, choice in layer.choices.items()
                         if done.model_ratio[tokens] > 1 and choice.backend != "dense"})
    parts = [f"{done.compaction.num_parameters:,} parameters cut out"] if done.compaction.num_parameters else []
    return one, other, ", ".join(parts + [f"kernel {name}" for name in on_kernels]) or "dense"


@torch.no_grad()
def speeds(models: Sequence[Any], batch_sequences: int, prompt_tokens: int, new_tokens: int,
           num_rounds: int = NUM_ROUNDS) -> list[Served]:
    """Of each of the models, which are on one device, in turn. ValueError where the tokens exceed a model's context."""
    limit = min(context_limit(model.config) for model in models)
    if prompt_tokens + new_tokens > limit:
        raise ValueError(f"prompt_tokens and new_tokens must be at most {limit:g} together, the model's context, got "
                         f"{prompt_tokens} and {new_tokens}")
    device = models[0].device
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(fused_gelu(model))
            if shares_prefixes(model):
                stack.enter_context(own_attention(model))
        scoring = time_in_turn([_scoring(model, batch_sequences, prompt_tokens) for model in models], device, num_rounds,
                               as_graphs=all(map(shares_prefixes, models)))
        decoding = _decode_ms([_decoding(model, batch_sequences, prompt_tokens, new_tokens) for model in models], device,
                              new_tokens, num_rounds)
    num_tokens = batch_sequences * prompt_tokens
    return [Served(scoring_tokens_per_s=num_tokens / statistics.median(times_us) * 1e6,
                   decode_ms=statistics.median(times_ms), resident_bytes=resident_bytes(model))
            for model, times_us, times_ms in zip(models, scoring, decoding)]


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all its weights and buffers, those that two share counted once; of a sparse layer all forms that it keeps."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for layer in (module for module in model.modules() if isinstance(module, SparseLinear)):
        tensors += [layer.sparse.bits, layer.sparse.values, *(part for packed in layer.packed.values() for part in packed)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in tensors if torch.is_tensor(tensor)}
    return sum(storages.values())


def _scoring(model: Any, batch_sequences: int, prompt_tokens: int) -> Callable[[], Tensor]:
    tokens = torch.ones(batch_sequences, prompt_tokens, dtype=torch.long, device=model.device)
    places = torch.arange(prompt_tokens, device=model.device)[None]
    head, is_ours = model.get_output_embeddings(), shares_prefixes(model)

    def score() -> Tensor:
        if is_ours:
            # one shape, again and again: what cuDNN's plan of it costs is paid once
            with attending(None), sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *KERNELS], set_priority=True):
                hidden = last_hidden(model, tokens, places)
        else:
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        logits: Tensor = head(hidden[:, -1])
        return logits

    return score


class _Decoding(NamedTuple):
    begin: Callable[[], object]
    """Reads the prompts."""
    advance: Callable[[], object]
    num_steps: int
    """New tokens of each sequence in one `advance`."""


def _decoding(model: Any, batch_sequences: int, prompt_tokens: int, new_tokens: int) -> _Decoding:
    if not shares_prefixes(model):
        return _plain_decoding(model, batch_sequences, prompt_tokens)
    prompts = [(1,) * prompt_tokens] * batch_sequences
    slots = Slots(partial(following, model), num_slots=batch_sequences, prefix=(), longest=prompt_tokens, max_new=new_tokens,
                  device=model.device, dtype=model.get_output_embeddings().weight.dtype, graphs=model.device.type == "cuda")

    def begin() -> None:
        slots.owner = [-1] * batch_sequences
        slots.fill(list(range(batch_sequences)), prompts)

    return _Decoding(begin, lambda: slots.advance(batch_sequences), slots.steps)


def _plain_decoding(model: Any, batch_sequences: int, prompt_tokens: int) -> _Decoding:
    tokens = torch.ones(batch_sequences, prompt_tokens, dtype=torch.long, device=model.device)
    cache: list[Any] = []

    def begin() -> None:
        cache[:] = [model(input_ids=tokens, use_cache=True).past_key_values]

    return _Decoding(begin, lambda: model(input_ids=tokens[:, :1], past_key_values=cache[0], use_cache=True), 1)


def _decode_ms(decodings: Sequence[_Decoding], device: torch.device, new_tokens: int, num_rounds: int) -> list[list[float]]:
    """Milliseconds of a step in each round, all models in turn."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times_ms: list[list[float]] = [[] for _ in decodings]
    for index in range(WARM_ROUNDS + num_rounds):
        for column, decoding in zip(times_ms, decodings):
            num_advances = -(-new_tokens // decoding.num_steps)
            decoding.begin()
            wait()
            started = time.perf_counter()
            for _ in range(num_advances):
                decoding.advance()
            wait()
            if index >= WARM_ROUNDS:
                column.append((time.perf_counter() - started) * 1e3 / (num_advances * decoding.num_steps))
    return times_ms
