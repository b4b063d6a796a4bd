"""Documents become three splits, a tokenizer, and packed blocks of tokens in a memory-mapped file."""

import bisect
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raysearch.study.files import default_cache_dir, new_file
from raysearch.training.chats import chat_template, chat_tokens, is_chat
from raysearch.training.corpus import END_OF_TEXT, Say, progress, quiet
from raysearch.training.texts import Part, Texts

FORMAT_VERSION = 1  # of the packed files; a change makes every cached file stale
BATCH_BYTES = 2**20
"""Text that is tokenized at once: all cores have work, and what the tokenizer keeps, up to 250 times as much, is small."""
LONE_SPACE = re.compile(r"(?<=\S)(?=\s\S)")
CUT_CHARS = 500
"""Text on each side of a cut that is tokenized to try it."""

SPLITS = ("train", "selection", "report")
HELD_OUT_SHARE = 0.05  # of the documents, for selection and again for report
MIN_DOCUMENTS_TO_SPLIT = 60  # with fewer, a split by document would leave a split empty, or one book
PIECE_CHARS = (200, 4000)  # shortest and longest pieces that documents are cut into then


def split_documents(documents: Texts) -> dict[str, Texts]:
    """{"train", "selection", "report"} -> documents: about 90, 5 and 5 % of them, by a hash of each document's text.

    So a document stays in its split when others come or go, and equal documents are never in two splits. Fewer than 60
    documents are first cut into pieces of at most 4000 characters at the ends of paragraphs. Raises ValueError when
    there are not three different pieces.
    """
    if len(documents) < MIN_DOCUMENTS_TO_SPLIT:
        low, high = PIECE_CHARS
        num_chars = sum(len(part) for index in range(len(documents)) for part in documents.parts(index))
        documents = documents.pieces(min(max(num_chars // MIN_DOCUMENTS_TO_SPLIT, low), high))
    position = [int.from_bytes(hashlib.sha256(data).digest()[:8]) / 2**64 for data in documents.all_bytes()]
    bounds = (1 - 2 * HELD_OUT_SHARE, 1 - HELD_OUT_SHARE)
    split_of = {where: bisect.bisect(bounds, where) for where in position}
    if len(split_of) < 3:
        raise ValueError("the corpus must hold at least 3 different passages, one for each of train, selection and "
                         f"report, got {len(split_of)}; give more text")
    if len(set(split_of.values())) < 3:  # too few for chance: hold out those with the highest hashes
        num_held = math.ceil(HELD_OUT_SHARE * len(split_of))
        split_of = {where: max(2 - i // num_held, 0) for i, where in enumerate(sorted(split_of, reverse=True))}
    chosen = np.array([split_of[where] for where in position])
    return {split: documents.where(chosen == index) for index, split in enumerate(SPLITS)}


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, with <|endoftext|> as id 0; equal documents give equal tokenizers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size must be above {len(alphabet)} (every byte and {END_OF_TEXT}), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """ValueError unless every id of the tokenizer has a row in a model of `vocab_size`, and an end of text exists."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(f"the tokenizer must fit the model's vocabulary of {vocab_size}, but its largest id is "
                         f"{largest}; use the tokenizer that the model was trained with")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer must have an end-of-text token to separate documents, got none; set eos_token")


@dataclass(frozen=True)
class Blocks:
    """Packed tokens in a file. Sent to another process it travels as its path, so the file must be there too."""

    path: Path
    """.npy, uint16 or uint32 [num_blocks, context]; of a corpus with chats [num_blocks, context, 2], of which the second says
    whether the token counts in the loss."""
    fingerprint: str
    """Hex; equal for equal text, tokenizer, context and split, on every machine."""

    @functools.cached_property
    def _stored(self) -> NDArray[np.unsignedinteger]:
        """Memory-mapped, read-only."""
        return np.load(self.path, mmap_mode="r")

    @functools.cached_property
    def tokens(self) -> NDArray[np.unsignedinteger]:
        """[num_blocks, context]"""
        return self._stored if self._stored.ndim == 2 else self._stored[..., 0]

    def __reduce__(self) -> tuple[type["Blocks"], tuple[Path, str]]:
        return Blocks, (self.path, self.fingerprint)

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)

    def batch(self, indices: Sequence[int] | NDArray[np.integer]) -> Tensor:
        """int64 [len(indices), context]"""
        return torch.from_numpy(self.tokens[np.asarray(indices, dtype=np.int64)].astype(np.int64))

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """[num_blocks] permutation of the blocks for one epoch; depends on seed and epoch only, here and everywhere."""
        return _permutation(len(self.tokens), seed, epoch)

    def stream(self, start: int, num_sequences: int, seed: int) -> Tensor:
        """int64 [num_sequences, context] of the endless stream of shuffled epochs, from its `start`-th on."""
        return self.batch(self._at(start, num_sequences, seed))

    def counted(self, start: int, num_sequences: int, seed: int) -> Tensor | None:
        """bool [num_sequences, context], which tokens of the same part of `stream` count in the loss; None where all do, as in
        a corpus without chats."""
        if self._stored.ndim == 2:
            return None
        return torch.from_numpy(self._stored[self._at(start, num_sequences, seed), :, 1] > 0)

    def _at(self, start: int, num_sequences: int, seed: int) -> list[int]:
        num_blocks = len(self.tokens)
        return [int(self.order(seed, p // num_blocks)[p % num_blocks]) for p in range(start, start + num_sequences)]


@functools.lru_cache(maxsize=4)
def _permutation(num: int, seed: int, epoch: int) -> NDArray[np.int64]:
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    permutation = np.random.RandomState(bits).permutation(num)  # frozen by numpy's NEP 19; Generator's is not
    permutation.flags.writeable = False
    return permutation


def pack(documents: Texts, tokenizer: PreTrainedTokenizerBase, context: int, split: str,
         cache_dir: Path | None = None, say: Say = quiet) -> Blocks:
    """The documents of one split in blocks of `context` tokens: in order, an end of text behind each, no tail.

    Made once and cached under a hash of the text, the tokenizer, `context` and `split`; two processes may make the same
    file at once. Raises ValueError when the split fills no block, and for chats that hold no answer or cannot be rendered.
    """
    check_tokenizer(tokenizer, 2**32)
    fingerprint = _fingerprint(documents, tokenizer, context, split)
    path = (cache_dir or default_cache_dir()) / "blocks" / f"{fingerprint}.npy"
    if not path.is_file():
        _write_blocks(path, _token_stream(documents, tokenizer, say), context, split)
    blocks = Blocks(path.resolve(), fingerprint)
    if blocks._stored.ndim == 3 and not blocks._stored[:, 1:, 1].any():
        raise ValueError(f"the chats of the corpus's {split} split must hold an answer, a message of the role assistant, got "
                         "none; give others")
    return blocks


def _fingerprint(documents: Texts, tokenizer: PreTrainedTokenizerBase, context: int, split: str) -> str:
    digest = hashlib.sha256()
    head = [f"{FORMAT_VERSION} {context} {split}".encode(), _tokenizer_json(tokenizer).encode("utf-8", "replace")]
    head += [chat_template(tokenizer).encode()] if documents.holds_chats else []
    for data in itertools.chain(head, documents.all_bytes()):
        digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()[:32]


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides how text becomes ids."""
    if tokenizer.is_fast:
        return f"{tokenizer.eos_token_id} {tokenizer.backend_tokenizer.to_str()}"
    return f"{tokenizer.eos_token_id} {type(tokenizer).__name__} {json.dumps(tokenizer.get_vocab(), sort_keys=True)}"


def _token_stream(documents: Texts, tokenizer: PreTrainedTokenizerBase, say: Say) -> Iterator[NDArray[np.unsignedinteger]]:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    total, holds_chats = documents.num_bytes / 1e6, documents.holds_chats
    parts = progress(_parts(documents, tokenizer), say,
                     lambda num_bytes: f"corpus: {num_bytes / 1e6:,.0f} of {total:,.0f} MB tokenized")
    for batch in _batches(parts):
        if holds_chats:
            yield _with_marks(batch, tokenizer).astype(dtype)
            continue
        ids = token_ids(tokenizer, [text for text, _ in batch], False)
        ends = ([tokenizer.eos_token_id] if is_last else [] for _, is_last in batch)
        yield np.fromiter(itertools.chain.from_iterable(itertools.chain.from_iterable(zip(ids, ends, strict=True))), dtype)


def _with_marks(batch: Sequence[Part], tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """[n, 2], tokens and whether they count: of plain text all, of a chat those of the answers. An end of text is not put
    behind a chat that the template ended with one."""
    chats = iter(chat_tokens([text for text, _ in batch if is_chat(text)], tokenizer))
    plain = iter(token_ids(tokenizer, [text for text, _ in batch if not is_chat(text)], False))
    parts: list[NDArray[np.int64]] = []
    for text, is_last in batch:
        ids, counts = next(chats) if is_chat(text) else (np.array(next(plain), dtype=np.int64), True)
        parts.append(np.stack([ids, np.broadcast_to(counts, ids.shape)], axis=1))
        if is_last and not (is_chat(text) and ids[-1:].tolist() == [tokenizer.eos_token_id]):
            parts.append(np.array([[tokenizer.eos_token_id, not is_chat(text)]]))
    return np.concatenate(parts)


def _parts(documents: Texts, tokenizer: PreTrainedTokenizerBase) -> Iterator[Part]:
    """Long documents in parts, so that each has work for all cores, and what the tokenizer keeps of a part stays small."""
    for index in range(len(documents)):
        held: list[str] = []
        for part in (documents[index],) if documents.is_chat(index) else documents.parts(index):
            if held and (cut := _cut(held[-1], tokenizer)):
                yield "".join(held)[:cut - len(held[-1])], False
                held = [held[-1][cut:]]
            held.append(part)
        yield "".join(held), True


def _cut(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the end of a text may be cut off: before the last lone white space with CUT_CHARS behind it, if there the tokenizer
    makes the same tokens of both sides as of the whole. Else 0, as where it puts a space before every text."""
    spaces = LONE_SPACE.finditer(text, len(text) - 2 * CUT_CHARS, len(text) - CUT_CHARS)
    if cut := max((space.start() for space in spaces), default=0):
        left, right = text[max(0, cut - CUT_CHARS):cut], text[cut:cut + CUT_CHARS]
        whole, *sides = token_ids(tokenizer, [left + right, left, right], False)
        return cut if list(whole) == list(itertools.chain(*sides)) else 0
    return 0


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    num_bytes = 0
    for part in parts:
        batch.append(part)
        num_bytes += len(part[0].encode())
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def token_ids(tokenizer: Any, texts: Sequence[str], special: bool | None) -> list[Sequence[int]]:
    """tokenizer(texts), by the shortest way through a fast tokenizer: on all cores, ids and nothing else."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None and fast.padding is None and fast.truncation is None and not tokenizer.split_special_tokens:
        return [encoding.ids for encoding in fast.encode_batch_fast(list(texts), add_special_tokens=special is not False)]
    options = {} if special is None else {"add_special_tokens": special}
    return tokenizer(list(texts), return_attention_mask=False, verbose=False, **options)["input_ids"]  # type: ignore[no-any-return]


def _write_blocks(path: Path, parts: Iterable[NDArray[np.unsignedinteger]], context: int, split: str) -> None:
    """Writes the tokens, with their marks where they have such, in the bytes of np.save, [num_blocks, context] without what
    fills no block. ValueError, and no file, where they fill none."""
    with new_file(path) as aside, open(aside, "wb") as file:

        def write_header(descr: str, *shape: int) -> int:
            """As long for any number of blocks: numpy leaves room."""
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
            return file.tell()

        num_tokens = header_bytes = 0
        for part in parts:
            header_bytes = header_bytes or write_header(part.dtype.str, 0, context, *part.shape[1:])
            file.write(part.tobytes())
            num_tokens += len(part)
        if num_tokens < context:
            raise ValueError(f"the corpus's {split} split must fill one block of {context} tokens, got {num_tokens} tokens; "
                             "give more text or a shorter context")
        file.truncate(header_bytes + num_tokens // context * context * part[0].nbytes)
        write_header(part.dtype.str, num_tokens // context, context, *part.shape[1:])
