"""A fast `lm_eval.api.model.LM`: the numbers of lm-eval's Hugging Face backend, with less work per item.

Three differences in how, none in what: a prefix that several requests share is computed once (tree attention, see
packing.py); the vocabulary projection runs at the scored positions only and in slices, so [B, S, V] never exists; and
results stay on the device until the last batch. lm-eval keeps tasks, prompts, metrics and standard errors.

Legend: B rows, S padded tokens per row, N scored positions, D hidden size, V vocabulary.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import DEFAULT_MAX_LENGTH, postprocess_generated_text, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn
from tqdm import tqdm

from raysearch.evaluation.attention import attending, own_attention, tree_mask
from raysearch.evaluation.encoding import Tokens, encode, encode_pairs
from raysearch.evaluation.forward import following, fused_gelu, last_hidden, last_mlp, only_at
from raysearch.evaluation.generation import Slots, by_settings, generate_plain, shared_prefix, stop_check, stop_ids
from raysearch.evaluation.graphs import Graphs, bucket
from raysearch.evaluation.packing import Layout, Request, Row, build_rows, lay_out, split_batches
from raysearch.models.architectures import shares_prefixes
from raysearch.models.model import context_limit, vocab_size

BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}
"""Padded tokens per forward. On a CPU 512 took 20.7 instead of 22.2 CPU s on 16 items, part of it padding that more items
do not have: 1,024 stays until it is measured on 500 (docs/log.md, 2026-11-25)."""

LOGIT_SLICE = {"cpu": 2**20, "cuda": 2**27}
"""Logits held at once: what fits the cache of a core (4 MiB in fp32), and what keeps a GPU busy (256 MiB in bf16)."""

TYPICAL_ANSWER_TOKENS = 16
"""What `forward_sizes` counts for an answer: its stop string ends it long before the task's limit."""

Gather = Callable[[object], list[Any]]


class Scorer(TemplateLM):  # type: ignore[misc]
    """Scores lm-eval requests with a Hugging Face causal LM, on the model's own device and dtype.

    lm-eval sees one process; with world_size > 1 the batches are dealt out over the ranks and the results of all ranks
    come together through `gather` (like all_gather_object: one object in, the list over ranks out), so that every rank
    returns the full list. `lockstep` is for models whose forward is a collective (ZeRO-3): all ranks then run the same
    number of forwards, on dummy batches where they have none of their own. An out-of-memory batch is halved, with one warning.
    `graphs` allows CUDA graphs on a GPU (never in lockstep): scoring takes one where it pays (graphs.py).
    `num_truncated` counts the requests that were cut on the left to fit the context, as lm-eval cuts them.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_tokens: int | None = None, rank: int = 0, world_size: int = 1,
                 gather: Gather | None = None, lockstep: bool = False, max_length: int | None = None, progress: bool = False,
                 graphs: bool = True) -> None:
        super().__init__()
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1; got {batch_tokens}")
        if world_size > 1 and gather is None:
            raise ValueError(f"world_size {world_size} needs a `gather` function; got None")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}); got {rank}")
        self.model: Any = model
        self.config = cast(Any, model).config
        self.tokenizer = tokenizer
        device_type = "cpu" if self.device.type == "cpu" else "cuda"
        self.batch_tokens = batch_tokens or BATCH_TOKENS[device_type]
        # scored positions projected at once
        self._slice: int = max(1, LOGIT_SLICE[device_type] // vocab_size(self.config))
        self.num_truncated = 0
        self.progress = progress
        resolved = resolve_max_length(self.config, tokenizer)  # which does not know every name of a limit
        self._max_length = max_length or int(min(resolved if resolved > 0 else DEFAULT_MAX_LENGTH, context_limit(self.config)))
        self._deal = (rank, world_size)
        self._gather: Gather = gather or (lambda result: [result])
        self._lockstep = lockstep
        takes_graphs = graphs and device_type == "cuda" and not lockstep
        self._graphs = Graphs(self._hidden_at) if takes_graphs and self.shares_prefixes else None
        # masked attention on a GPU needs a multiple of 8
        self._multiple = 1 if device_type == "cpu" else 8
        self._warned_out_of_memory = False

    @property
    def device(self) -> torch.device:
        return cast(torch.device, next(self.model.parameters()).device)

    @property
    def max_length(self) -> int:
        """Context length in tokens."""
        return self._max_length

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return int(bos if bos is not None else self.tokenizer.eos_token_id)

    @property
    def shares_prefixes(self) -> bool:
        return shares_prefixes(self.model)

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return list(self.encode([string], add_special_tokens)[0])

    def encode(self, strings: Sequence[str], add_special_tokens: bool | None = None) -> list[Tokens]:
        return encode(self.tokenizer, self.prefix_token_id, strings, add_special_tokens)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        return encode_pairs(self.tokenizer, self.prefix_token_id, pairs)

    # ---- log-likelihoods ---------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, is greedy) of each (context, continuation)."""
        pairs = self.encode_pairs([request.args for request in requests])
        for request, (_, continuation) in zip(requests, pairs):
            if not continuation:
                raise ValueError(f"task {request.task_name}, item {request.doc_id}: its continuation must be at least one "
                                 f"token, but this tokenizer makes none of {request.args[1]!r:.80}; mend or remove the item")
        return self.score(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text, in lm-eval's disjoint windows of max_length tokens."""
        windows: list[tuple[Tokens, Tokens]] = []
        owners: list[int] = []
        for owner, tokens in enumerate(self.encode([request.args[0] for request in requests])):
            for window in get_rolling_token_windows(list(tokens), self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((tuple(context), tuple(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self.score(windows)):
            totals[owner] += logprob
        return totals

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> list[Any]:
        return self.score([(tuple(context), tuple(continuation)) for _, context, continuation in requests])

    def score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """(log-probability in nats, is greedy) of each (context tokens, continuation tokens)."""
        requests = [self._request(context, continuation) for context, continuation in pairs]
        rows = build_rows(requests, width=self.config.get_text_config().hidden_size, max_row_tokens=self.batch_tokens,
                          share=self.shares_prefixes)
        batches = split_batches(rows, self.batch_tokens, self._multiple)
        rank, world_size = self._deal
        scored: list[tuple[list[Row], Layout, Tensor]] = []
        with self._inference():
            for start in self._bar(range(0, len(batches), world_size), "Scoring"):
                wave = batches[start:start + world_size]  # one batch for each rank
                # vocabulary projections of the largest batch, as many as every rank runs
                slices = max(-(-len(lay_out(batch).positions) // self._slice) for batch in wave) if self._lockstep else 0
                if rank < len(wave):
                    scored.extend(self._score_or_halve(wave[rank], slices))
                elif self._lockstep:
                    self._score_batch(lay_out(wave[0]), slices)
        by_request: dict[int, tuple[float, bool]] = {}
        for part in self._gather(_summed(scored)):
            by_request.update(part)
        return [by_request[index] for index in range(len(pairs))]

    def _request(self, context: Tokens, continuation: Tokens) -> Request:
        if not context or not continuation:
            raise ValueError("a request needs at least 1 token of context and 1 of continuation; got "
                             f"{len(context)} and {len(continuation)}")
        whole = context + continuation
        if len(whole) > self.max_length + 1:
            self.num_truncated += 1
            whole = whole[-(self.max_length + 1):]
        return Request(whole[:-1], continuation[-self.max_length:])  # lm-eval refuses the longer continuation

    def _score_or_halve(self, batch: list[Row], slices: int) -> Iterator[tuple[list[Row], Layout, Tensor]]:
        layout = lay_out(batch, self._multiple)
        try:
            result = self._score_batch(layout, slices)
        except torch.OutOfMemoryError:
            if len(batch) == 1 or self._lockstep:  # in lockstep the other ranks would wait for ever
                raise
            result = None
        if result is not None:
            yield batch, layout, result
            return
        self._halve(f"{len(batch)} rows of {layout.tokens.shape[1]} tokens")
        for half in (batch[:len(batch) // 2], batch[len(batch) // 2:]):
            yield from self._score_or_halve(half, slices)

    def _halve(self, what: str) -> None:
        """After running out of memory: half the tokens per batch for what comes, and one warning."""
        if not self._warned_out_of_memory:
            warnings.warn(f"out of memory with {what}: the batch is halved "
                          f"(batch_tokens is {self.batch_tokens}; a smaller one avoids this)", stacklevel=2)
            self._warned_out_of_memory = True
        self.batch_tokens = max(1, self.batch_tokens // 2)
        if self._graphs is not None:
            self._graphs.clear()
        torch.cuda.empty_cache()

    def _score_batch(self, layout: Layout, slices: int) -> Tensor:
        """[2, n] fp32 on the device, in the order of layout.targets: log-probability, and 1 where it is the argmax."""
        spare = 0 if self._graphs is None else bucket(len(layout.positions)) - len(layout.positions)
        tokens, depths, ends, positions, owners, targets = self._to_device(
            layout.tokens, layout.depths, layout.ends, np.pad(layout.positions, (0, spare)), layout.owners, layout.targets)
        logits_at = self._logits(layout.is_chain, tokens, depths, ends, positions)
        firsts = range(0, len(layout.positions), self._slice)
        bounds = np.searchsorted(layout.owners, [*firsts, len(layout.positions)])
        parts = [_target_logprobs(logits_at(first, first + self._slice), owners[start:stop] - first, targets[start:stop])
                 for first, start, stop in zip(firsts, bounds, bounds[1:])]
        for _ in range(len(parts), slices):
            logits_at(0, 1)
        return torch.cat(parts, dim=1)

    def _logits(self, is_chain: bool, tokens: Tensor, depths: Tensor, ends: Tensor,
                positions: Tensor) -> Callable[[int, int], Tensor]:
        """Function (start, stop) -> logits [stop - start, V] at positions[start:stop] of the flattened [B * S]."""
        if not self.shares_prefixes:
            logits = self.model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
            return lambda start, stop: logits[positions[start:stop]]
        hidden = (self._graphs or self._hidden_at)(is_chain, tokens, depths, ends, positions)
        head = self.model.get_output_embeddings()
        return lambda start, stop: head(hidden[start:stop])

    def _hidden_at(self, is_chain: bool, tokens: Tensor, depths: Tensor, ends: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states [N, D] at positions of the flattened [B * S]."""
        # nothing reads the last MLP elsewhere; in lockstep DeepSpeed has hooks of its own on it
        mlp = None if self._lockstep else last_mlp(self.model)
        with attending(None if is_chain else tree_mask(ends, self._dtype)), only_at(positions, mlp):
            return last_hidden(self.model, tokens, depths).flatten(0, 1)[positions]

    # ---- generation --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuation of each context, cut before the first of its `until` strings."""
        texts: dict[int, str] = {}
        with self._inference():
            for (until, max_gen_tokens), members in by_settings(requests).items():
                contexts = self.encode([requests[index].args[0] for index in members])
                for part in self._gather(self._generate(contexts, until, max_gen_tokens)):
                    texts.update({members[index]: text for index, text in part.items()})
        return [texts[index] for index in range(len(requests))]

    def forward_sizes(self, requests: Sequence[Instance]) -> dict[int, int]:
        """Tokens per forward -> about how many such forwards these requests take: what sparse kernels are timed for.

        A batch of scoring; for generation a step, which has a token per slot, and filling all slots with prompts.
        """
        sizes: dict[int, int] = {}
        generating = [request for request in requests if request.request_type == "generate_until"]
        scoring = [request for request in requests if request.request_type != "generate_until"]
        if scoring:
            num_tokens = sum(map(len, self.encode(["".join(request.args) for request in scoring])))
            sizes[max(1, min(self.batch_tokens, num_tokens))] = -(-num_tokens // self.batch_tokens)
        for (_, max_gen_tokens), members in by_settings(generating).items():
            contexts = self.encode([generating[index].args[0] for index in members])
            longest = min(max(map(len, contexts)), self.max_length)
            num_slots = max(1, min(self._num_rows(longest, max_gen_tokens), len(contexts)))
            num_fills = -(-len(contexts) // num_slots)
            filling = num_slots * max(1, longest - shared_prefix(contexts))
            for size, number in ((num_slots, num_fills * min(max_gen_tokens, TYPICAL_ANSWER_TOKENS)), (filling, num_fills)):
                sizes[size] = sizes.get(size, 0) + number
        return sizes

    def _num_rows(self, longest: int, max_gen_tokens: int) -> int:
        """Rows of generation that fit, by the tokens of their caches."""
        return 4 * self.batch_tokens // (longest + max_gen_tokens)

    def _generate(self, contexts: Sequence[Tokens], until: tuple[str, ...], max_gen_tokens: int) -> dict[int, str]:
        """Index -> text of this rank's share of the contexts, which are cut on the left to leave room for the answer."""
        room = self.max_length - max_gen_tokens
        if room <= 0:
            raise ValueError(f"max_gen_toks must be less than the context of {self.max_length} tokens; got "
                             f"{max_gen_tokens}")
        self.num_truncated += sum(len(context) > room for context in contexts)
        prompts = [context[-room:] or (self.prefix_token_id,) for context in contexts]
        # longest first, so that memory peaks at the start
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), prompts[index]))
        rank, world_size = self._deal
        indices = order[rank::world_size]
        generate = self._generate_in_slots if self.shares_prefixes else self._generate_plain
        answers: list[list[int]] | None = None
        while answers is None:
            num_rows = self._num_rows(len(prompts[order[0]]), max_gen_tokens)
            try:
                answers = generate(prompts, indices, until, max_gen_tokens, max(1, min(num_rows, len(indices))))
            except torch.OutOfMemoryError:
                if num_rows <= 1 or self._lockstep:
                    raise
            if answers is None:  # outside of the handler, whose traceback holds the tensors that did not fit
                self._halve(f"{num_rows} rows of generation")
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return {index: postprocess_generated_text(text, list(until), None) for index, text in zip(indices, texts)}

    def _generate_in_slots(self, prompts: list[Tokens], indices: list[int], until: tuple[str, ...], max_new: int,
                           num_slots: int) -> list[list[int]]:
        """New tokens of the prompts at `indices`. The shared prefix is that of all prompts, because in lockstep every
        rank must run its forward."""
        slots = Slots(functools.partial(following, self.model), num_slots=num_slots, prefix=prompts[0][:shared_prefix(prompts)],
                      longest=max(map(len, prompts)), max_new=max_new, device=self.device, dtype=self._dtype,
                      graphs=self._graphs is not None)
        with self._progress(len(indices), "Generating") as bar:
            return slots.run([prompts[index] for index in indices], stop_check(self.tokenizer, until, slots.steps),
                             stop_ids(self.model, self.tokenizer), agree=self._gather, lockstep=self._lockstep,
                             on_done=lambda _: bar.update())

    def _generate_plain(self, prompts: list[Tokens], indices: list[int], until: tuple[str, ...], max_new: int,
                        num_rows: int) -> list[list[int]]:
        """The same for families that share no prefixes."""
        answers: list[list[int]] = []
        for start in self._bar(range(0, len(indices), num_rows), "Generating"):
            batch = [prompts[index] for index in indices[start:start + num_rows]]
            answers += generate_plain(self.model, self.tokenizer, batch, until, max_new)
        return answers

    # ---- small things ------------------------------------------------------------------------------------------------

    @contextmanager
    def _inference(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        if self._graphs is not None:
            self._graphs.check(self.model)
        try:
            with torch.no_grad(), ExitStack() as stack:
                if not self._lockstep:
                    stack.enter_context(fused_gelu(self.model))
                if self.shares_prefixes:
                    stack.enter_context(own_attention(self.model))
                yield
        finally:
            self.model.train(was_training)

    @property
    def _dtype(self) -> torch.dtype:
        """What the attention layers compute in."""
        return cast(torch.dtype, self.model.get_output_embeddings().weight.dtype)

    def _to_device(self, *arrays: Any) -> tuple[Tensor, ...]:
        """int64 arrays on the device, by one copy that does not wait for the work before it."""
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        if self.device.type != "cpu":
            flat = flat.pin_memory().to(self.device, non_blocking=True)
        return tuple(part.view(array.shape) for part, array in zip(flat.split([array.size for array in arrays]), arrays))

    def _progress(self, total: int, title: str) -> Any:
        return tqdm(total=total, desc=title, disable=not (self.progress and self._deal[0] == 0))

    def _bar(self, steps: Sequence[int], title: str) -> Iterator[int]:
        with self._progress(len(steps), title) as bar:
            for step in steps:
                yield step
                bar.update()


def _summed(scored: Sequence[tuple[list[Row], Layout, Tensor]]) -> dict[int, tuple[float, bool]]:
    """Request -> (log-probability in nats, is greedy), of batches with the results of `_score_batch`."""
    if not scored:
        return {}
    results = torch.cat([result for *_, result in scored], dim=1).cpu().double().numpy()  # the one wait for the GPU
    by_request: dict[int, tuple[float, bool]] = {}
    bounds = np.cumsum([0] + [len(layout.order) for _, layout, _ in scored])
    for (batch, layout, _), first, last in zip(scored, bounds, bounds[1:]):
        logprobs, greedy = np.empty((2, last - first))
        logprobs[layout.order], greedy[layout.order] = results[:, first:last]
        parts = [part for row in batch for part in row.scored]
        starts = np.cumsum([0] + [len(part.targets) for part in parts[:-1]])
        sums, all_greedy = np.add.reduceat(logprobs, starts), np.minimum.reduceat(greedy, starts) > 0
        by_request.update(zip((part.request for part in parts), zip(sums.tolist(), all_greedy.tolist())))
    return by_request


def _target_logprobs(logits: Tensor, owner: Tensor, targets: Tensor) -> Tensor:
    """[2, n] fp32: log-softmax of logits [m, V] at (owner[i], targets[i]), and whether that target is the argmax."""
    best = logits.argmax(dim=-1)
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)[owner, targets]
    return torch.stack([logprobs, (best[owner] == targets).float()])
