"""Rows are prefix trees: every request sees exactly its own tokens, in order, and shared tokens stand once."""

import random

import numpy as np
import pytest

from raysearch.evaluation.packing import Request, Row, build_rows, common_prefix, sharing_pays, split_batches


def random_requests(seed: int) -> list[Request]:
    generator = random.Random(seed)
    stems = [[generator.randrange(5) for _ in range(generator.randrange(1, 30))] for _ in range(6)]
    requests = []
    for _ in range(40):
        tokens = generator.choice(stems)[:generator.randrange(1, 31)] + [
            generator.randrange(5) for _ in range(generator.randrange(0, 6))]
        scored = generator.randrange(1, len(tokens) + 1)
        requests.append(Request(tuple(tokens), tuple(generator.randrange(5) for _ in range(scored))))
    return requests


def visible(row: Row, position: int) -> list[int]:
    return [k for k in range(len(row.tokens)) if k <= position <= row.ends[k]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [True, False])
def test_each_request_sees_its_own_tokens(seed: int, share: bool) -> None:
    requests = random_requests(seed)
    rows = build_rows(requests, width=64, max_row_tokens=100, share=share)
    found = set()
    for row in rows:
        for scored in row.scored:
            request = requests[scored.request]
            path = visible(row, scored.positions[-1])
            assert tuple(row.tokens[path]) == request.tokens
            assert list(row.depths[path]) == list(range(len(request.tokens)))
            assert list(scored.positions) == path[len(path) - len(request.targets):]
            assert tuple(scored.targets) == request.targets
            found.add(scored.request)
        assert row.is_chain == (list(row.depths) == list(range(len(row.tokens))))
    assert found == set(range(len(requests)))


def test_multiple_choice_context_stands_once() -> None:
    context = tuple(range(50))
    requests = [Request((*context, 100 + k, 200 + k), (100 + k, 200 + k, 7)) for k in range(4)]
    row, = build_rows(requests, width=512, max_row_tokens=1000, share=True)
    assert len(row.tokens) == 50 + 4 * 2
    assert [scored.positions[0] for scored in row.scored] == [49] * 4
    assert len(build_rows(requests, width=512, max_row_tokens=1000, share=False)) == 4
    assert len(build_rows(requests, width=512, max_row_tokens=54, share=True)) == 2


def test_sharing_must_pay() -> None:
    assert sharing_pays(78, 49, 78, 512)
    assert not sharing_pays(80, 1, 80, 512)
    assert not sharing_pays(100_000, 49, 78, 512)
    assert not sharing_pays(10, 0, 10, 512)


def test_common_prefix_against_brute_force() -> None:
    generator = random.Random(0)
    for _ in range(300):
        left = tuple(generator.randrange(2) for _ in range(generator.randrange(12)))
        right = tuple(generator.randrange(2) for _ in range(generator.randrange(12)))
        brute = next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
        assert common_prefix(left, right) == brute


def test_batches_hold_the_budget_and_every_row_once() -> None:
    rows = build_rows(random_requests(1), width=64, max_row_tokens=60, share=True)
    batches = split_batches(rows, 90)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows))
    for batch in batches:
        lengths = [len(row.tokens) for row in batch]
        assert lengths == sorted(lengths, reverse=True)
        assert len(batch) == 1 or lengths[0] * len(batch) <= 90
        assert len({row.is_chain for row in batch}) == 1


def test_nothing_to_score() -> None:
    assert build_rows([], width=8, max_row_tokens=10, share=True) == []
    assert split_batches([], 10) == []
    assert np.array_equal(build_rows([Request((3,), (4,))], width=8, max_row_tokens=1, share=True)[0].ends, [0])
