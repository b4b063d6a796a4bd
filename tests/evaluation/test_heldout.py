"""Evaluation items that are cut from held-out documents."""

import hashlib
from typing import Any

from tiny_models import story

from raysearch.evaluation.heldout import choice_items, last_word_items, text_items

DOCUMENTS = [story(7 * n) for n in range(12)]


def test_heldout_items_are_deterministic_and_sampled() -> None:
    for cut in (text_items, last_word_items, choice_items):
        everything = cut(DOCUMENTS, limit=None, seed=0)
        assert everything == cut(DOCUMENTS, limit=None, seed=0)
        some = cut(DOCUMENTS, limit=5, seed=1)
        assert len(some) == 5
        assert {item["item_id"] for item in some} <= {item["item_id"] for item in everything}
        assert some != cut(DOCUMENTS, limit=5, seed=2)
        assert cut([], limit=None, seed=0) == []


def test_items_carry_the_document_they_were_cut_from() -> None:
    words = {hashlib.sha256(document.encode()).hexdigest()[:16]: document.split() for document in DOCUMENTS}
    for cut, texts in ((text_items, ["text"]), (last_word_items, ["context", "target"]), (choice_items, ["context"])):
        items: list[dict[str, Any]] = cut(DOCUMENTS, limit=None, seed=0)
        assert {item["document"] for item in items} == set(words)
        for item in items:
            cut_out, whole = " ".join("".join(item[text] for text in texts).split()), " ".join(words[item["document"]])
            assert cut_out in whole
            if cut is choice_items:
                assert f"{item['context']} {item['choices'][item['label']]}" in whole


def test_text_pieces_cover_the_documents() -> None:
    pieces = text_items(["one two " * 1000, "x" * 5000], limit=None, seed=0)
    assert "".join(piece["text"] for piece in pieces).replace(" ", "") == "onetwo" * 1000 + "x" * 5000
    assert max(len(piece["text"]) for piece in pieces) <= 1600


def test_last_words_end_sentences_and_occur_before() -> None:
    items = last_word_items(DOCUMENTS, limit=None, seed=0)
    text = " ".join(DOCUMENTS)
    assert len(items) >= 12
    for item in items:
        passage = item["context"] + item["target"]
        assert passage + "." in text
        assert item["target"][1:] in item["context"]
        assert 150 <= len(passage) + 1 <= 500


def test_choices_hold_one_true_continuation_of_similar_length() -> None:
    items = choice_items(DOCUMENTS, limit=None, seed=0)
    text = " ".join(DOCUMENTS)
    labels = [item["label"] for item in items]
    assert len(items) >= 20
    assert len(set(labels)) == 4
    for item in items:
        choices: Any = item["choices"]
        assert len(set(choices)) == 4
        assert f"{item['context']} {choices[labels[items.index(item)]]}" in text
        assert all(choice in text for choice in choices)
        assert max(map(len, choices)) < 2 * min(map(len, choices))
