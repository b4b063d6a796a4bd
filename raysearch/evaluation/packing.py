"""Packs scoring requests into rows that compute each shared prefix once. Pure: token ids in, index arrays out.

Legend: s = tokens of one row, c = scored tokens of one request.

A row is a prefix tree flattened in depth-first order. Token k sees its ancestors only, and in depth-first order the
descendants of k are the contiguous run k..ends[k], so "q may attend to k" is `k <= q <= ends[k]`: one integer per token
describes the whole mask. A row of a single request is the ordinary causal chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ATTENTION_COST = 4
"""Cost of one multiply-add in masked attention against one in a matrix product (2026-11-23, CPU, width 512: 2 to 6)."""


@dataclass(frozen=True)
class Request:
    """One continuation to score: the model reads `tokens`, and its last len(targets) outputs are scored."""

    tokens: tuple[int, ...]  # context + continuation without its last token, already cut to the model's context
    targets: tuple[int, ...]  # the continuation, [c]


@dataclass(frozen=True)
class Scored:
    """Where one request's scored positions lie in its row."""

    request: int  # index into the list of requests
    positions: Ints  # [c], positions in the row
    targets: Ints  # [c], token ids


@dataclass(frozen=True)
class Layout:
    """One batch as the arrays that the device needs; B rows padded to S tokens, N scored positions, n targets."""

    tokens: Ints  # [B, S]
    depths: Ints  # [B, S], position ids
    ends: Ints  # [B, S], last position that may attend to this token
    positions: Ints  # [N], distinct scored positions of the flattened [B * S], ascending
    owners: Ints  # [n], index into `positions` of each target, ascending
    targets: Ints  # [n], token ids
    order: Ints  # [n], where in the batch's requests, one after the other, each target belongs
    is_chain: bool  # every row is a plain causal sequence


@dataclass(frozen=True)
class Row:
    tokens: Ints  # [s]
    depths: Ints  # [s], position ids
    ends: Ints  # [s], last position that may attend to this token
    scored: tuple[Scored, ...]
    is_chain: bool  # a plain causal sequence, no mask needed


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens that the two sequences share."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    low, high = 0, length - 1  # left[:low] is shared, left[:high + 1] is not
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def sharing_pays(row_tokens: int, shared_tokens: int, request_tokens: int, width: int) -> bool:
    """True when adding a request to a row costs less than giving it a row of its own.

    A row of s tokens costs s * 12 * width^2 in matrix products and 2 * s^2 * width in attention, per layer; the
    difference of the two ways, divided by 2 * width, is the inequality below.
    """
    new = request_tokens - shared_tokens
    attention = (row_tokens + new) ** 2 - row_tokens**2 - request_tokens**2
    return shared_tokens > 0 and 6 * width * shared_tokens > ATTENTION_COST * attention


def build_rows(requests: Sequence[Request], *, width: int, max_row_tokens: int, share: bool) -> list[Row]:
    """Rows that score every request, shared prefixes merged where it pays (never when `share` is False).

    Sorted token sequences that share a prefix are neighbours, and inserting them in that order is the depth-first walk
    of their prefix tree. `width` is the model's hidden size; a request longer than max_row_tokens gets its own row.
    """
    rows: list[Row] = []
    builder: _RowBuilder | None = None
    for index in sorted(range(len(requests)), key=lambda i: requests[i].tokens):
        request = requests[index]
        if share and builder is not None:
            shared = common_prefix(builder.last, request.tokens)
            fits = len(builder.tokens) + len(request.tokens) - shared <= max_row_tokens
            if fits and sharing_pays(len(builder.tokens), shared, len(request.tokens), width):
                builder.add(index, request, shared)
                continue
        if builder is not None:
            rows.append(builder.row())
        builder = _RowBuilder()
        builder.add(index, request, 0)
    if builder is not None:
        rows.append(builder.row())
    return rows


def split_batches(rows: Sequence[Row], batch_tokens: int, multiple: int = 1) -> list[list[Row]]:
    """Batches of rows of similar length with at most `batch_tokens` tokens each, padded as `lay_out` pads them; chains
    and trees stay apart.

    Longest first, so that memory peaks at the start and a time estimate errs on the safe side.
    """
    batches: list[list[Row]] = []
    # chains apart, because they need no mask, and attention without one is the faster kernel
    for row in sorted(rows, key=lambda row: (row.is_chain, -len(row.tokens))):
        if batches:
            first = batches[-1][0]
            longest = -(-len(first.tokens) // multiple) * multiple
            if first.is_chain == row.is_chain and longest * (len(batches[-1]) + 1) <= batch_tokens:
                batches[-1].append(row)
                continue
        batches.append([row])
    return batches


def lay_out(batch: Sequence[Row], multiple: int = 1) -> Layout:
    """The batch's arrays, S rounded up to a multiple of `multiple`; padding sees itself only."""
    longest = -(-max(len(row.tokens) for row in batch) // multiple) * multiple
    tokens, depths = np.zeros((2, len(batch), longest), np.int64)
    ends = np.tile(np.arange(longest), (len(batch), 1))
    for b, row in enumerate(batch):
        tokens[b, :len(row.tokens)] = row.tokens
        depths[b, :len(row.tokens)] = row.depths
        ends[b, :len(row.tokens)] = row.ends
    flat = np.concatenate([b * longest + scored.positions for b, row in enumerate(batch) for scored in row.scored])
    targets = np.concatenate([scored.targets for row in batch for scored in row.scored])
    is_scored = np.zeros(tokens.size, bool)
    is_scored[flat] = True  # endings share the context's last position
    order = np.argsort(flat, kind="stable")
    owners = (np.cumsum(is_scored) - 1)[flat[order]]
    return Layout(tokens, depths, ends, np.flatnonzero(is_scored), owners, targets[order], order,
                  all(row.is_chain for row in batch))


class _RowBuilder:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []
        self.path: list[int] = []  # position in the row of each token of `last`
        self.last: tuple[int, ...] = ()
        self.scored: list[Scored] = []
        self.is_chain = True

    def add(self, index: int, request: Request, shared: int) -> None:
        if shared < len(self.path):
            self.is_chain = False
            for position in self.path[shared:]:  # the walk leaves this branch, so its subtrees end here
                self.ends[position] = len(self.tokens) - 1
        start = len(self.tokens)
        self.tokens.extend(request.tokens[shared:])
        self.depths.extend(range(shared, len(request.tokens)))
        self.ends.extend([-1] * (len(self.tokens) - start))
        self.path[shared:] = range(start, len(self.tokens))
        self.last = request.tokens
        positions = self.path[len(self.path) - len(request.targets):]
        self.scored.append(Scored(index, np.array(positions, np.int64), np.array(request.targets, np.int64)))

    def row(self) -> Row:
        for position in self.path:
            self.ends[position] = len(self.tokens) - 1
        return Row(np.array(self.tokens, np.int64), np.array(self.depths, np.int64), np.array(self.ends, np.int64),
                   tuple(self.scored), self.is_chain)
