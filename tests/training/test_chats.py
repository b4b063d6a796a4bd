"""Chats as training text: which tokens are an answer's, in every format, and what cannot be told from the rest."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from commands import Run
from tiny_models import story
from transformers import PreTrainedTokenizerFast

from raysearch.config import Action, study_of
from raysearch.study.ledger import Ledger
from raysearch.training.chats import chat_document, chat_tokens
from raysearch.training.corpus import load_documents
from raysearch.training.data import pack, split_documents
from raysearch.training.finetune import finetune
from raysearch.trial.inputs import read_inputs, resolve
from raysearch.trial.worker import Worker

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
MARKED = ("{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>\n"
          "{% endgeneration %}{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}" + PROMPT)
"""Says which is an answer."""


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"Which dog of house {number}? \U0001f600"},
            {"role": "assistant", "content": f"The réd one of {number}."}, {"role": "user", "content": story(number)[:99]},
            {"role": "assistant", "content": f"Near the river, {number}."}]


CHATS = [chat(number) for number in range(90)]


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of byte tokens, with a template that does not say which are an answer's."""
    return with_template(tiny_model, TURNS + PROMPT, tmp_path_factory.mktemp("chats") / "model")


def with_template(folder: Path, template: str, into: Path) -> Path:
    shutil.copytree(folder, into)
    tokenizer_of(folder, template).save_pretrained(into)
    return into


def tokenizer_of(folder: Path, template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, chats: list[Any] = CHATS, field: str = "messages") -> Path:
    path.write_text("".join(json.dumps({field: each, "id": 1}) + "\n" for each in chats))
    return path


def answers(ids: Any, counts: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode([int(each) for each, is_counted in zip(ids, counts, strict=True) if is_counted])


@pytest.mark.parametrize("template", [TURNS + PROMPT, MARKED])
def test_the_answers_are_what_counts(template: str, model: Path) -> None:
    tokenizer = tokenizer_of(model, template)
    wanted = "The réd one of 7.<|end|>\nNear the river, 7.<|end|>\n"
    (ids, counts), (_, others) = chat_tokens([chat_document(CHATS[7], ""), chat_document(CHATS[8][:2], "")], tokenizer)
    assert tokenizer.decode(ids.tolist()) == tokenizer.apply_chat_template(CHATS[7], tokenize=False)
    assert answers(ids, counts, tokenizer) == wanted
    assert not others.any()


def test_a_template_without_a_prompt_for_answers(model: Path) -> None:
    """As that of Llama 2: an answer follows its question without a word between them."""
    template = ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
                " {{ m.content }} </s>{% endif %}{% endfor %}")
    tokenizer = tokenizer_of(model, template)
    ((ids, counts),) = chat_tokens([chat_document(CHATS[1], "")], tokenizer)
    assert answers(ids, counts, tokenizer) == " The réd one of 1. </s> Near the river, 1. </s>"


def test_a_template_that_writes_the_day_gives_the_same_tokens_every_day(model: Path) -> None:
    template = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}\n" + TURNS + PROMPT
    tokenizer = tokenizer_of(model, template)
    (ids, _), (again, _) = (chat_tokens([chat_document(CHATS[1], "")], tokenizer)[0] for _ in range(2))
    assert np.array_equal(ids, again)
    assert tokenizer.decode(ids.tolist()).startswith("26 Jul 2024\n<|system|>")


CHANGES = ("{% for m in messages %}<|{{ m.role }}|>{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% endif %}<|end|>"
           "{% endfor %}")
"""Shows the last answer alone, as templates do that drop earlier thoughts."""


@pytest.mark.parametrize(("template", "messages", "sentence"), [
    (CHANGES, CHATS[0], "with message 3 the template changes what stands before it"),
    (TURNS + "{% if add_generation_prompt %}<think>{% endif %}", CHATS[0], "with message 3 the template changes what stands"),
    (TURNS, CHATS[0][2:], "it begins with an answer"),
    ("{{ raise_exception('roles must alternate') }}", CHATS[0], r"cannot be rendered for training \(roles must alternate\)"),
])
def test_what_the_template_cannot_tell_is_one_sentence(template: str, messages: list[Any], sentence: str, model: Path) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        chat_tokens([chat_document(messages, "")], tokenizer_of(model, template))
    assert "\n" not in str(error.value)
    assert "mark the answers in the chat template" in str(error.value)


# ---- corpora ----


def as_parquet(path: Path) -> None:
    rows = [[{"tool": None, **message} for message in each] for each in CHATS]  # a column that no row has filled
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), path)


@pytest.mark.parametrize(("name", "make"), [
    ("a.jsonl", write), ("a.json", lambda path: path.write_text(json.dumps([{"messages": each} for each in CHATS]))),
    ("a.parquet", as_parquet), ("saved", lambda path: datasets.Dataset.from_dict({"messages": CHATS}).save_to_disk(str(path))),
    ("turns.jsonl", lambda path: write(path, field="turns")),
    ("nulls.jsonl", lambda path: path.write_text("".join(json.dumps({"text": None, "messages": each}) + "\n"
                                                         for each in [*CHATS, []]))),
])
def test_every_format_gives_the_same_chats(name: str, make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / name)
    found = load_documents(str(tmp_path / name), "turns" if name.startswith("turns") else "text")
    assert list(found) == [chat_document(each, "") for each in CHATS]
    assert found.holds_chats


def test_rows_that_have_a_text_are_read_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a story", "messages": CHATS[0]}))
    assert list(load_documents(str(tmp_path / "a.jsonl"))) == ["a story"]


@pytest.mark.parametrize(("messages", "sentence"), [
    ([{"from": "human", "value": "a"}], "line 1: a chat is a list of messages with `role` and `content`, got {'from'"),
    ([{"role": 3, "content": "a"}], "line 1: a chat is a list of messages"),
    ({"role": "user"}, "line 1: every row needs a field `text` with a string or null, got a dict in it"),
    (["a"], "line 1: every row needs a field `text` with a string or null, got a list in it")])
def test_what_is_no_chat_is_one_sentence(messages: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_documents(str(write(tmp_path / "a.jsonl", [messages])))


def test_chats_are_held_out_whole(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": story(number) * 9}, {"role": "assistant", "content": "Yes."}] for number in range(20)]
    splits = split_documents(load_documents(str(write(tmp_path / "a.jsonl", chats))))
    documents = [document for split in splits.values() for document in split]
    assert sorted(documents) == sorted(chat_document(each, "") for each in chats)
    assert all(len(split) for split in splits.values())


def test_blocks_hold_chats_and_text_with_their_marks(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", CHATS[:40])
    (tmp_path / "b.txt").write_text("\n<|endoftext|>\n".join(f"A story, {number}." for number in range(40)))
    tokenizer, texts = tokenizer_of(model, MARKED), load_documents(str(tmp_path))
    blocks = pack(texts, tokenizer, 32, "train", tmp_path / "cache")
    ids, counts = blocks.tokens.reshape(-1), blocks._stored[..., 1].reshape(-1)
    whole = tokenizer.decode(ids.tolist())
    assert whole.startswith("<|system|>Be short.<|end|>\n")
    assert whole.count("Near the river, 7.<|end|>\n<|endoftext|><|system|>") == 1
    decoded = answers(ids, counts, tokenizer)
    assert decoded.startswith("The réd one of 0.<|end|>\nNear the river, 0.<|end|>\nThe réd one of 1.")
    assert "A story, 3.\n<|endoftext|>\nA story, 4." in decoded  # all of plain text, its ends too
    assert blocks.num_tokens == ids.size
    order = blocks.order(5, 0)[2:5]
    assert blocks.stream(2, 3, 5).equal(torch.from_numpy(blocks.tokens[order].astype(np.int64)))
    assert blocks.counted(2, 3, 5).equal(torch.from_numpy(blocks._stored[order][..., 1] > 0))
    prints = {pack(texts, tokenizer_of(model, template), 32, "train", tmp_path / "cache").fingerprint
              for template in (MARKED, TURNS, TURNS + PROMPT)}
    assert len(prints) == 3
    plain = pack(load_documents(str(tmp_path / "b.txt")), tokenizer, 32, "train", tmp_path / "cache")
    assert plain.counted(0, 2, 0) is None
    assert plain == pack(load_documents(str(tmp_path / "b.txt")), tokenizer_of(model, TURNS), 32, "train", tmp_path / "cache")
    silent = [each[:2] for each in CHATS]
    with pytest.raises(ValueError, match="must hold an answer, a message of the role assistant"):
        pack(load_documents(str(write(tmp_path / "c.jsonl", silent))), tokenizer, 32, "train", tmp_path / "cache")


def test_a_chat_that_ends_with_an_end_of_text_gets_no_other(model: Path, tmp_path: Path) -> None:
    template = TURNS.replace("<|end|>\n", "<|endoftext|>")
    tokenizer = tokenizer_of(model, template)
    blocks = pack(load_documents(str(write(tmp_path / "a.jsonl"))), tokenizer, 32, "train", tmp_path / "cache")
    assert "<|endoftext|><|endoftext|>" not in tokenizer.decode(blocks.tokens.reshape(-1).tolist())


# ---- training and evaluation ----


@pytest.fixture(scope="module")
def worker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = tmp_path_factory.mktemp("study")
    study = resolve(study_of(path=str(model), corpus=str(write(folder / "a.jsonl")), context_tokens=64, batch_tokens=256,
                             tasks=()))
    return Worker(study, Ledger(folder / "study"), read_inputs(study))


@pytest.mark.parametrize("distils", [{}, {"distill_alpha": 0.5, "temperature": 2.0}])
def test_fine_tuning_learns_the_answers_and_nothing_else(distils: dict[str, float], worker: Worker) -> None:
    engine, blocks = worker.engine, worker.inputs.blocks
    tokens, counted = blocks.stream(0, 64, 0), blocks.counted(0, 64, 0)
    is_of_questions = ~torch.isin(tokens, tokens[counted])  # letters that are in no answer

    @torch.no_grad()
    def losses() -> tuple[float, float]:
        logits = engine.model.eval()(input_ids=tokens).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        return nats[counted[:, 1:]].mean().item(), nats[is_of_questions[:, 1:]].mean().item()

    engine.load_base()
    before = losses()
    engine.restart(0.0, **distils)
    action = Action(sparsity=0.0, finetune_tokens=256 * 60, learning_rate=3e-3, **distils)
    found = finetune(engine, blocks, action, 0.1)
    after = losses()
    assert after[0] < before[0] / 2, "the answers"
    assert after[1] > before[1] + 0.2, "the questions"
    assert distils or found == pytest.approx(after[0], abs=0.4)


def test_the_root_key_covers_template_and_rows(model: Path, worker: Worker, tmp_path: Path) -> None:
    study, key = worker.study, worker.inputs.root_key
    for template, is_same in ((TURNS + PROMPT, True), (MARKED, False)):
        other = with_template(model, template, tmp_path / str(is_same))
        assert (read_inputs(study.replaced(path=str(other))).root_key == key) == is_same
    assert read_inputs(study.replaced(corpus=str(write(tmp_path / "b.jsonl", CHATS[1:])))).root_key != key


def test_text_tasks_pretraining_and_a_tokenizer_without_template_refuse_chats(model: Path, tiny_model: Path, worker: Worker,
                                                                              tmp_path: Path, run: Run) -> None:
    corpus = write(tmp_path / "a.jsonl")
    code, _, err = run("prune", model, "--sparsity", 0.5, "--corpus", corpus, "--out", "out", "--context-tokens", 64)
    assert (code, "tasks text, last_word, choice are made from running text, but the corpus" in err) == (2, True), err
    code, _, err = run("evaluate", model, "--tasks", "text", "--corpus", corpus)
    assert (code, "tasks text are made from running text" in err) == (2, True), err
    code, _, err = run("pretrain", "--preset", "tiny", "--corpus", corpus, "--out", "out")
    assert (code, "which need a tokenizer with a chat template, and pretraining makes its own" in err) == (2, True), err
    with pytest.raises(ValueError, match="the corpus holds chats, but the tokenizer has no chat template") as error:
        read_inputs(worker.study.replaced(path=str(tiny_model)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
