"""Evaluation items cut from held-out documents: pieces of text, last words, true continuations among four.

Deterministic in (documents, limit, seed); everything here is text in, dictionaries out. Each item carries the `content_id` of
the document it was cut from, because items of one document are no independent samples.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

PIECE_CHARS = 1600
"""Length of a `text` piece: about 400 tokens."""

PASSAGE_CHARS = (150, 500)
"""Length of a `last_word` passage and its context; LAMBADA's are about 350."""

CONTEXT_CHARS = (100, 260)
CONTINUATION_CHARS = (40, 120)
"""Lengths of the two parts of a `choice` item; HellaSwag's are about 200 and 120."""

NUM_CHOICES = 4

T = TypeVar("T")

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u201d\u2019)]*\s+(?=[\"'\u201c\u2018(A-Z])|\n\s*\n")
_LAST_WORD = re.compile(r"^(.+\s)([A-Za-z]{3,})[.!?][\"'\u201d\u2019)]*$", re.DOTALL)


def text_items(documents: Sequence[str], *, limit: int | None, seed: int) -> list[dict[str, str]]:
    """Pieces of PIECE_CHARS characters, cut at white space: {"text"}."""
    pieces = [(cut_from, piece) for document in documents for cut_from in [content_id(document)] for piece in _pieces(document)]
    return [{"item_id": content_id(piece), "document": cut_from, "text": piece}
            for cut_from, piece in _sample(pieces, limit, seed)]


def last_word_items(documents: Sequence[str], *, limit: int | None, seed: int) -> list[dict[str, str]]:
    """Passages of two or more sentences whose last word, of at least three letters, stands in the text before it too
    (as for most of LAMBADA, Paperno et al. 2016; differs in that no people filtered them): {"context", "target"}."""
    items = []
    for document in documents:
        sentences = [" ".join(part.split()) for part in _SENTENCE_END.split(document) if part.strip()]
        cut_from = content_id(document)
        start = 0
        while start < len(sentences):
            passage, used = "", 0
            for sentence in sentences[start:]:
                if len(passage) + len(sentence) > PASSAGE_CHARS[1]:
                    break
                passage, used = f"{passage} {sentence}".strip(), used + 1
                match = _LAST_WORD.match(passage)
                if used >= 2 and len(passage) >= PASSAGE_CHARS[0] and match and re.search(rf"\b{match[2]}\b", match[1]):
                    items.append({"item_id": content_id(passage), "document": cut_from, "context": match[1].rstrip(),
                                  "target": " " + match[2]})
                    break
            start += max(1, used)
    return _sample(items, limit, seed)


def choice_items(documents: Sequence[str], *, limit: int | None, seed: int) -> list[dict[str, object]]:
    """Passages and four continuations, one of them the true one: {"context", "choices", "label"}.

    The three others are continuations of other passages of the same documents, the nearest in length among 24 drawn
    (HellaSwag's, Zellers et al. 2019, are written by a model and filtered; these are easier for a person).
    """
    pairs = []
    for document in documents:
        words, cut_from = re.findall(r"\S+", document), content_id(document)
        start = 0
        while start < len(words):
            context, start = _take(words, start, CONTEXT_CHARS)
            continuation, start = _take(words, start, CONTINUATION_CHARS)
            if len(context) >= CONTEXT_CHARS[0] and len(continuation) >= CONTINUATION_CHARS[0]:
                pairs.append((cut_from, context, continuation))
    continuations = list(dict.fromkeys(continuation for *_, continuation in pairs))
    if len(continuations) < NUM_CHOICES:
        return []
    items: list[dict[str, object]] = []
    for cut_from, context, true in _sample(pairs, limit, seed):
        generator = random.Random(f"{seed} {context}")
        drawn = [text for text in generator.sample(continuations, min(24, len(continuations))) if text != true]
        choices = [true, *sorted(drawn, key=lambda text: abs(len(text) - len(true)))[:NUM_CHOICES - 1]]
        generator.shuffle(choices)
        items.append({"item_id": content_id(context + true), "document": cut_from, "context": context, "choices": choices,
                      "label": choices.index(true)})
    return items


def content_id(text: str) -> str:
    """Identity of an item or a document by its content: the first 8 bytes of its sha256 as 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sample(items: list[T], limit: int | None, seed: int) -> list[T]:
    if limit is None or limit >= len(items):
        return items
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), limit))]


def _pieces(document: str) -> Iterator[str]:
    start = 0
    while start < len(document):
        end = min(start + PIECE_CHARS, len(document))
        if end < len(document):
            space = max(document.rfind(" ", start, end), document.rfind("\n", start, end))
            end = space if space > start else end
        piece = document[start:end].strip()
        if piece:
            yield piece
        start = end


def _take(words: Sequence[str], start: int, chars: tuple[int, int]) -> tuple[str, int]:
    """Words from `start`, to the first sentence end after chars[0] characters or to chars[1]; and the next index."""
    length, stop = 0, start
    while stop < len(words) and length + len(words[stop]) + 1 <= chars[1]:
        length += len(words[stop]) + 1
        stop += 1
        if length > chars[0] and words[stop - 1][-1] in ".!?":
            break
    stop = max(stop, start + 1)  # a word longer than chars[1] is skipped by the length test of the caller
    return " ".join(words[start:stop])[:chars[1]], stop
