"""Documents in one piece of memory, in letters of one to four bytes."""

import json
import random
import tracemalloc

import pytest

import raysearch.training.texts
from raysearch.training.texts import Texts

LETTERS = "ab é\u2019\n\n\u4e2d\U0001f600 "
RANDOM = random.Random(0)
DOCUMENTS = ["".join(RANDOM.choices(LETTERS, k=RANDOM.randint(3, 400))) + "." for _ in range(50)]


def whole(documents: list[str]) -> Texts:
    return Texts.of((document, True) for document in documents)


def test_documents_are_what_was_given_whatever_their_parts() -> None:
    parts = [(document[at:at + 7], at + 7 >= len(document)) for document in DOCUMENTS for at in range(0, len(document), 7)]
    texts = Texts.of(parts)
    assert list(texts) == list(whole(DOCUMENTS)) == DOCUMENTS
    assert (len(texts), texts[3], texts[-1]) == (50, DOCUMENTS[3], DOCUMENTS[-1])
    assert texts.num_bytes == sum(len(document.encode()) for document in DOCUMENTS)
    assert list(texts.where(texts.spans[:, 0] > 0)) == DOCUMENTS[1:]
    assert not Texts.of([])


def test_blank_documents_are_left_out_and_half_characters_mended() -> None:
    half = json.loads('"\\ud83d"')
    parts = [("", False), (" \n\u2028", True), ("a", False), (" ", True), ("", True), (f"b{half}", True), (" lost", False)]
    assert list(Texts.of(parts)) == ["a ", "b?"]


@pytest.mark.parametrize("part_bytes", [1, 5, 10**6])
def test_parts_and_pieces_are_the_text_however_it_is_read(part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    once = list(whole(["".join(DOCUMENTS)]).pieces(90))
    monkeypatch.setattr(raysearch.training.texts, "PART_BYTES", part_bytes)
    texts = whole(DOCUMENTS)
    assert ["".join(texts.parts(index)) for index in range(len(texts))] == DOCUMENTS
    assert list(whole(["".join(DOCUMENTS)]).pieces(90)) == once
    assert max(map(len, once)) <= 90
    assert "".join(once).split() == "".join(DOCUMENTS).split()
    assert all(piece.strip() for piece in once)
    assert list(whole(["one two", " " * 30, "three"]).pieces(5)) == ["one ", "two", "three"]


def test_memory_is_that_of_the_bytes() -> None:
    """As Python's str, a text with one emoji takes four bytes for each letter; 100,000 short ones 50 more each."""
    tracemalloc.start()
    texts = Texts.of(("a" * 2**16 + "\U0001f600", index % 64 == 0) for index in range(256))
    short = Texts.of(("a \U0001f600", True) for _ in range(100_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * (texts.num_bytes + short.num_bytes + 100_000 * 16 * 3)
