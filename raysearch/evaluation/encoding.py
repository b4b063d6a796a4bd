"""Token ids of texts and of (context, continuation) pairs, by lm-eval's rules, on all cores and once for each text."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from lm_eval.models.utils import has_bos_prefix

from raysearch.training.data import token_ids

Tokens = tuple[int, ...]

MAX_CACHED = 500_000
"""Texts of one tokenizer; then its cache begins anew."""
_ENCODED: "WeakKeyDictionary[Any, dict[tuple[str, bool | None], Tokens]]" = WeakKeyDictionary()


def encode(tokenizer: Any, prefix_token_id: int, strings: Sequence[str],
           add_special_tokens: bool | None = None) -> list[Tokens]:
    """Token ids of each string, by lm-eval's rule: no second BOS where the string starts with one. Cached for the
    life of the tokenizer, because a sweep scores the same items after every round."""
    cache = _ENCODED.setdefault(tokenizer, {})
    if len(cache) > MAX_CACHED:
        cache.clear()
    missing = [text for text in dict.fromkeys(strings) if (text, add_special_tokens) not in cache]
    prefix = tokenizer.decode(prefix_token_id)
    starts_with_bos = [add_special_tokens is None and has_bos_prefix(text, prefix) for text in missing]
    for flag, special in ((False, add_special_tokens), (True, False)):
        group = [text for text, starts in zip(missing, starts_with_bos) if starts is flag]
        if group:
            cache.update({(text, add_special_tokens): tuple(ids)
                          for text, ids in zip(group, token_ids(tokenizer, group, special))})
    return [cache[text, add_special_tokens] for text in strings]


def encode_pairs(tokenizer: Any, prefix_token_id: int, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
    """Token ids of (context, continuation) pairs: TemplateLM._encode_pair and its empty-context rule, batched."""
    moved = []  # trailing spaces of the context belong to the continuation
    for context, continuation in pairs:
        stripped = context.rstrip()
        moved.append((stripped, context[len(stripped):] + continuation) if context else ("", continuation))
    wholes = encode(tokenizer, prefix_token_id, [context + continuation for context, continuation in moved])
    contexts = encode(tokenizer, prefix_token_id, [context for context, _ in moved])
    encoded = []
    for (original, continuation), whole, head in zip(pairs, wholes, contexts):
        if original:
            encoded.append((head, whole[len(head):]))
            continue
        alone = encode(tokenizer, prefix_token_id, [continuation], add_special_tokens=False)[0]
        if alone and alone[0] == prefix_token_id:
            encoded.append((alone[:1], alone[1:]))
        else:
            encoded.append(((prefix_token_id,), alone))
    return encoded
