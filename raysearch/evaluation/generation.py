"""Greedy generation, in slots: a static key-value cache whose rows take the next prompt as soon as theirs is finished.

On a GPU a CUDA graph replays several steps at a time and the host reads the tokens of one replay while the next one
runs, so a row may run a few steps past its end; nothing after a stop counts. Families that share no prefixes generate by
transformers' own `generate` (generate_plain).

Legend: R slots of L tokens, of which the first n are in use; P tokens of a prefix that all prompts share; S new tokens.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor

from raysearch.evaluation.attention import additive, attending
from raysearch.evaluation.encoding import Tokens
from raysearch.evaluation.packing import common_prefix

Following = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(tokens [n, S], position ids [n, S], which of the S ends the row [n] or None for the last) -> argmax tokens [n]."""

GRAPH_STEPS = 8
"""Steps of one replay: answers are about 5 to 10 tokens."""
MIN_SHARED_TOKENS = 16
"""A shorter prefix is not worth a forward of its own."""
MAX_GEN_TOKENS = 256
"""lm-eval's default when a task does not say how many tokens to generate."""


def by_settings(requests: Sequence[Instance]) -> dict[tuple[tuple[str, ...], int], list[int]]:
    """(stop strings, tokens at most) -> indices of the requests that generate with them. ValueError for sampling."""
    groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for index, request in enumerate(requests):
        settings: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], MAX_GEN_TOKENS))
        if settings.get("do_sample"):
            raise ValueError(f"generation is greedy; got do_sample=True for request {index}")
        until = settings.get("until") or []
        key = (tuple([until] if isinstance(until, str) else until), settings["max_gen_toks"])
        groups.setdefault(key, []).append(index)
    return groups


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the generation settings' own, as `generate` takes them, or the tokenizer's."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    return set(ids) if isinstance(ids, list) else {int(ids)}


def stop_check(tokenizer: Any, until: Sequence[str], steps: int) -> Callable[[list[list[int]]], list[bool]]:
    """Function that says which token lists hold a stop string in what the last `steps` tokens added."""
    # a token has a byte at least, so a stop string lies in as many tokens as it has bytes; 4 more for a cut character
    window = max((len(text.encode()) for text in until), default=0) + 4 + steps

    def ended(answers: list[list[int]]) -> list[bool]:
        tails = tokenizer.batch_decode([tokens[-window:] for tokens in answers], skip_special_tokens=True)
        return [any(text in tail for text in until if text) for tail in tails]

    return ended


def generate_plain(model: Any, tokenizer: Any, prompts: Sequence[Tokens], until: Sequence[str],
                   max_new: int) -> list[list[int]]:
    """New tokens of one left-padded batch of prompts, without the stop id, by transformers' own `generate`."""
    longest = max(map(len, prompts))
    tokens, mask = torch.zeros(2, len(prompts), longest, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        tokens[b, longest - len(prompt):], mask[b, longest - len(prompt):] = torch.tensor(prompt), 1
    ends = stop_ids(model, tokenizer)
    output = model.generate(
        input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new, do_sample=False,
        pad_token_id=min(ends), stopping_criteria=stop_sequences_criteria(
            tokenizer, [text for text in until if text], longest, len(prompts)))
    return [row[:next((n for n, token in enumerate(row) if token in ends), len(row))]
            for row in output[:, longest:].tolist()]


def shared_prefix(prompts: Sequence[Tokens]) -> int:
    """Tokens that all prompts start with, leaving each at least one of its own; 0 where they are too few."""
    first, last = min(prompts), max(prompts)  # the two that differ earliest
    shared = min(common_prefix(first, last), min(len(prompt) for prompt in prompts) - 1)
    return shared if shared >= MIN_SHARED_TOKENS else 0


class Slots:
    """R rows of generation with their cache. `run` gives the new tokens of every prompt, up to the one that ends it."""

    def __init__(self, following: Following, *, num_slots: int, prefix: Tokens, longest: int, max_new: int,
                 device: torch.device, dtype: torch.dtype, graphs: bool) -> None:
        self.following, self.device, self.dtype = following, device, dtype
        self.num_slots, self.prefix, self.max_new, self.graphs = num_slots, prefix, max_new, graphs
        self.limit = longest + max_new  # within the model's context
        self.length = self._round(self.limit)
        self.keys: dict[int, Tensor] = {}  # by layer, [R, H, L, D]
        self.values: dict[int, Tensor] = {}
        self.steps = GRAPH_STEPS if graphs else 1
        self.token = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.position = torch.zeros_like(self.token)  # where the token goes
        self.new_tokens = torch.zeros(num_slots, self.steps, dtype=torch.long, device=device)
        self.owner = [-1] * num_slots  # the prompt in each slot
        self.filled = [0] * num_slots  # bound of `position`, on the host
        self.planned = [0] * num_slots  # new tokens asked for so far
        self.captured: dict[int, Any] = {}
        if prefix:
            self._following(torch.tensor([prefix], device=device), torch.arange(len(prefix), device=device)[None], None,
                            None, self._store_prefix)

    def run(self, prompts: Sequence[Tokens], ended: Callable[[list[list[int]]], list[bool]], stop_ids: set[int],
            agree: Callable[[object], list[Any]], lockstep: bool, on_done: Callable[[int], object]) -> list[list[int]]:
        """New tokens of each prompt, without the stop id. `ended` says which of these token lists hold a stop string.
        In lockstep every rank runs the same forwards, and `agree` gathers what each wants next."""
        queue = deque(range(len(prompts)))
        answers: list[list[int]] = [[] for _ in prompts]
        done: set[int] = set()
        unread: deque[tuple[list[int], Tensor, Any]] = deque()
        while len(done) < len(prompts) or lockstep:
            active = sum(owner >= 0 for owner in self.owner)
            unfinished = False
            # a fill is a forward of its own, so it waits until an eighth of the slots is free
            refill = bool(queue) and (not active or self.num_slots - active >= max(1, self.num_slots // 8))
            if lockstep:
                wishes = agree((refill, active > 0))
                anyone_refills, anyone_steps = (any(column) for column in zip(*wishes))
                if not anyone_refills and not anyone_steps:
                    break
                if anyone_refills != refill or (not anyone_refills and not active):  # another rank's turn: a dummy forward
                    self._following(torch.zeros(1, 1, dtype=torch.long, device=self.device),
                                    torch.zeros(1, 1, dtype=torch.long, device=self.device), None, None, None)
                    continue
            if refill:
                chosen = [queue.popleft() for _ in range(min(len(queue), self.num_slots - active))]
                unread.append(self._read(chosen, self.fill(chosen, [prompts[index] for index in chosen])))
            elif unfinished := any(owner >= 0 and planned < self.max_new for owner, planned in zip(self.owner, self.planned)):
                if not queue:
                    self._compact(active)
                used = self._used()
                unread.append(self._read(self.owner[:used], self.advance(used)))
            while len(unread) > (1 if self.graphs and (refill or unfinished) else 0):  # one is read while the next runs
                owners, tokens, event = unread.popleft()
                if event is not None:
                    event.synchronize()
                touched = self._absorb(owners, tokens.tolist(), answers, done, stop_ids)
                for index, end in zip(touched, ended([answers[index] for index in touched])):
                    if end:
                        done.add(index)
                for slot, owner in enumerate(self.owner):
                    if owner in done:
                        self.owner[slot] = -1
                        on_done(owner)
        return answers

    def _absorb(self, owners: list[int], tokens: list[list[int]], answers: list[list[int]], done: set[int],
                stop_ids: set[int]) -> list[int]:
        """Appends the tokens of rows that still count; the prompts among them that no stop id or length has ended."""
        touched = []
        for owner, row in zip(owners, tokens):
            if owner < 0 or owner in done:
                continue
            for token in row:
                if token in stop_ids:
                    done.add(owner)
                    break
                answers[owner].append(token)
                if len(answers[owner]) == self.max_new:
                    done.add(owner)
                    break
            if owner not in done:
                touched.append(owner)
        return touched

    def fill(self, owners: list[int], prompts: list[Tokens]) -> Tensor:
        """Computes prompts in free slots; their first new tokens [b, 1]."""
        free = [slot for slot, owner in enumerate(self.owner) if owner < 0][:len(owners)]
        start = len(self.prefix)
        longest = self._round(max(map(len, prompts))) - start
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        for b, prompt in enumerate(prompts):
            tokens[b, :len(prompt) - start] = torch.tensor(prompt[start:])
        for slot, owner, prompt in zip(free, owners, prompts):
            self.owner[slot], self.filled[slot], self.planned[slot] = owner, len(prompt), 1
        lengths = self._to_device(torch.tensor([len(prompt) for prompt in prompts]))
        slots = self._to_device(torch.tensor(free))
        positions = torch.arange(start, start + longest, device=self.device)
        mask = None
        if start:
            mask = additive(torch.arange(start + longest, device=self.device) <= positions[:, None], self.dtype)[None, None]

        def extend(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return (self._store_prompt(self.keys, layer, slots, key), self._store_prompt(self.values, layer, slots, value))

        first = self._following(self._to_device(tokens), positions.clamp(max=self.limit - 1).expand(len(prompts), -1),
                                lengths - start - 1, mask, extend)
        self.token[slots], self.position[slots] = first, lengths
        return first[:, None]

    def advance(self, used: int) -> Tensor:
        """`steps` new tokens of the first `used` slots, [used, steps]."""
        longest = self.length if self.graphs else min(self.length, self._round(max(self.filled[:used]) + 1))
        self.filled = [min(filled + self.steps, self.limit - 1) for filled in self.filled]
        self.planned = [planned + self.steps for planned in self.planned]
        graph = self.captured.get(used)
        if not self.graphs or graph is None:
            self._steps(used, longest)
            self.captured[used] = 0  # warmed up
        else:
            if graph == 0:
                graph = self.captured[used] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._steps(used, longest)
            graph.replay()
        return self.new_tokens[:used]

    def _steps(self, used: int, longest: int) -> None:
        rows, columns = torch.arange(used, device=self.device), torch.arange(longest, device=self.device)
        for step in range(self.steps):
            position = self.position[:used].clone()
            mask = additive(columns <= position[:, None], self.dtype)[:, None, None]

            def extend(layer: int, key: Tensor, value: Tensor, at: Tensor = position) -> tuple[Tensor, Tensor]:
                self.keys[layer][rows, :, at], self.values[layer][rows, :, at] = key[:, :, 0], value[:, :, 0]
                return self.keys[layer][:used, :, :longest], self.values[layer][:used, :, :longest]

            following = self._following(self.token[:used, None], position[:, None], None, mask, extend)
            self.token[:used] = following
            self.new_tokens[:used, step] = following
            self.position[:used] = (position + 1).clamp(max=self.limit - 1)

    def _compact(self, active: int) -> None:
        """Moves the last rows into free slots once half of the used ones are free: fewer rows pay for the copy."""
        if 2 * active > self._used():
            return
        holes = [slot for slot in range(active) if self.owner[slot] < 0]
        last = [slot for slot in range(active, self.num_slots) if self.owner[slot] >= 0]
        to, source = self._to_device(torch.tensor([holes, last]))
        for cache in (*self.keys.values(), *self.values.values(), self.token, self.position):
            cache[to] = cache[source]
        for hole, slot in zip(holes, last):
            self.owner[hole], self.filled[hole], self.planned[hole] = self.owner[slot], self.filled[slot], self.planned[slot]
            self.owner[slot] = -1

    def _used(self) -> int:
        """Slots that a step computes: up to the last one in use, for graphs a half, a quarter, ... of all of them."""
        used = max((slot + 1 for slot, owner in enumerate(self.owner) if owner >= 0), default=0)
        if not self.graphs:
            return used
        size = self.num_slots
        while size // 2 >= used:
            size //= 2
        return size

    def _store_prefix(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        for cache, new in ((self.keys, key), (self.values, value)):
            self._of(cache, layer, new)[:, :, :len(self.prefix)] = new
        return key, value

    def _store_prompt(self, cache: dict[int, Tensor], layer: int, slots: Tensor, new: Tensor) -> Tensor:
        start = len(self.prefix)
        stored = self._of(cache, layer, new)
        stored.narrow(2, start, new.shape[2]).index_copy_(0, slots, new)
        return torch.cat([stored[:1, :, :start].expand(len(new), -1, -1, -1), new], dim=2) if start else new

    def _of(self, cache: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        if layer not in cache:  # zeros, because a masked NaN is still a NaN
            cache[layer] = new.new_zeros(self.num_slots, new.shape[1], self.length, new.shape[3])
        return cache[layer]

    def _following(self, tokens: Tensor, positions: Tensor, last: Tensor | None, mask: Tensor | None, extend: Any) -> Tensor:
        with attending(mask, extend):
            return self.following(tokens, positions, last)

    def _read(self, owners: list[int], tokens: Tensor) -> tuple[list[int], Tensor, Any]:
        """The tokens on their way to the host, and the event to wait for."""
        if self.device.type == "cpu":
            return list(owners), tokens.clone(), None
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return list(owners), host, event

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _round(self, length: int) -> int:
        """Up to a multiple of 8 on a GPU, which its masked attention needs."""
        return length if self.device.type == "cpu" else -(-length // 8) * 8
