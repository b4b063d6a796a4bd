"""Chats as text to fine-tune on: rendered by the tokenizer's chat template, the tokens of the assistant's answers marked.

Among documents a chat is its messages as JSON behind a mark that no text begins with; so it is held out, hashed and counted
as any document is, and becomes tokens where blocks are packed.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raysearch.study.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\x1echat "
"""JSON behind a record separator, as in RFC 7464."""
MESSAGES = "messages"
"""Where a row holds a chat that has no text."""
SAYS_ITSELF = re.compile(r"\{%-?\s*generation\b")
"""In a template that marks the answers."""
NO_TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"
"""Before a template that writes the day, so that equal text has equal tokens: the day of Llama's where they know none."""

Message = dict[str, Any]
Render = Callable[..., str]


def is_chat(document: str) -> bool:
    return document.startswith(MARK)


def chat_document(messages: Sequence[object], where: str) -> str:
    """The messages, [{"role", "content"}, ...], as a document; fields that are null are left out, as Parquet has them where a
    row has none. ValueError for what is no message."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: a chat is a list of messages with `role` and `content`, got {str(message)[:80]}; write "
                             "it as chat templates of transformers take it")
    return MARK + json.dumps(_without_nulls(messages), ensure_ascii=False)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Of the tokenizer, as it is used here; ValueError where it has none, or cannot say which characters a token is of."""
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError:
        raise ValueError("the corpus holds chats, but the tokenizer has no chat template; save it with one "
                         "(chat_template.jinja), or give plain text") from None
    if not tokenizer.is_fast:
        raise ValueError(f"the corpus holds chats, for which a fast tokenizer is needed, got {type(tokenizer).__name__}; save "
                         "its tokenizer.json, or give plain text")
    return NO_TODAY + template if "strftime_now" in template else template


def chat_tokens(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
                ) -> list[tuple[NDArray[Any], NDArray[np.bool_]]]:
    """(ids [n], whether each is part of an answer [n]) of each chat. The answers are what the template puts into its
    `generation` blocks; where it has none, what it adds to all that stands before an assistant's message and the prompt for it.

    ValueError where a template refuses a chat, or changes what stands before an answer when that is added.
    """
    if not documents:
        return []
    template = chat_template(tokenizer)
    chats = [json.loads(document.removeprefix(MARK)) for document in documents]
    render = functools.partial(tokenizer.apply_chat_template, chat_template=template)
    if SAYS_ITSELF.search(template):
        plain = {"return_attention_mask": False, "verbose": False}
        encoded = [_refusing(chat, render, chat, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=plain)
                   for chat in chats]
        return [(np.array(each["input_ids"]), np.array(each["assistant_masks"], dtype=bool)) for each in encoded]
    as_text = functools.partial(render, tokenize=False)
    texts = [_refusing(chat, as_text, chat) for chat in chats]
    whole = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    found = []
    for chat, text, ids, offsets in zip(chats, texts, whole["input_ids"], whole["offset_mapping"], strict=True):
        starts, ends = np.array(offsets).reshape(-1, 2).T
        is_counted = np.zeros(len(ids), dtype=bool)
        for start, end in _refusing(chat, _answers, chat, text, as_text):
            is_counted |= (starts < end) & (ends > start)
        found.append((np.array(ids), is_counted))
    return found


def _answers(chat: Sequence[Message], text: str, render: Render) -> list[tuple[int, int]]:
    """(first character, end) of each answer in the rendered text."""
    spans = []
    for number, message in enumerate(chat):
        if message["role"] == "assistant":
            if not number:
                raise ValueError("it begins with an answer, before which the template may put anything")
            before = render(chat[:number], add_generation_prompt=True)
            up_to = render(chat[:number + 1])
            if not (text.startswith(up_to) and up_to.startswith(before)):
                raise ValueError(f"with message {number + 1} the template changes what stands before it, so the answer cannot "
                                 "be told from the rest")
            spans.append((len(before), len(up_to)))
    return spans


def _refusing(chat: Sequence[Message], function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return function(*arguments, **named)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the chat {json.dumps(chat, ensure_ascii=False)[:80]}...: cannot be rendered for training "
                         f"({first_line(error)}); mend it, or mark the answers in the chat template with generation blocks"
                         ) from error
