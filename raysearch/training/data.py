"""Documents become three splits, a tokenizer, and packed blocks of tokens in a memory-mapped file."""

import bisect
import functools
import hashlib
import itertools
import json
import math
import os
import tempfile
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

from raysearch.study.files import default_cache_dir
from raysearch.training.corpus import END_OF_TEXT, Say, load_parts, progress, quiet

FORMAT_VERSION = 1  # of the packed files; a change makes every cached file stale
BATCH_CHARS = 2**21
"""Text that is tokenized at once: all cores have work, and what the tokenizer keeps of a token, some 100 bytes, stays small."""

SPLITS = ("train", "selection", "report")
HELD_OUT_SHARE = 0.05  # of the documents, for selection and again for report
MIN_DOCUMENTS_TO_SPLIT = 60  # with fewer, a split by document would leave a split empty, or one book
PIECE_CHARS = (200, 4000)  # shortest and longest pieces that documents are cut into then


def split_documents(documents: Sequence[str]) -> dict[str, list[str]]:
    """{"train", "selection", "report"} -> documents: about 90, 5 and 5 % of them, by a hash of each document's text.

    So a document stays in its split when others come or go, and equal documents are never in two splits. Fewer than 60
    documents are first cut into pieces of at most 4000 characters at the ends of paragraphs. Raises ValueError when
    there are not three different pieces.
    """
    return _split([[document] for document in documents])


def load_splits(corpus: str, field: str = "text", say: Say = quiet) -> dict[str, list[str]]:
    """`split_documents` of `load_documents`, without a long document's text twice in memory."""
    return _split(load_parts(corpus, field, say))


def _split(parts_of: list[list[str]]) -> dict[str, list[str]]:
    """Of documents in parts, which are used up."""
    if len(parts_of) < MIN_DOCUMENTS_TO_SPLIT:
        low, high = PIECE_CHARS
        num_chars = min(max(sum(len(part) for parts in parts_of for part in parts) // MIN_DOCUMENTS_TO_SPLIT, low), high)
        documents = [piece for parts in parts_of for piece in _pieces(parts, num_chars)]
    else:
        documents = ["".join(parts) for parts in parts_of]
        parts_of.clear()
    position = {text: int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8]) / 2**64
                for text in documents}
    if len(position) < 3:
        raise ValueError("the corpus must hold at least 3 different passages, one for each of train, selection and "
                         f"report, got {len(position)}; give more text")
    bounds = (1 - 2 * HELD_OUT_SHARE, 1 - HELD_OUT_SHARE)
    split_of = {text: SPLITS[bisect.bisect(bounds, where)] for text, where in position.items()}
    if len(set(split_of.values())) < 3:  # too few for chance: hold out those with the highest hashes
        ranked = sorted(position, key=lambda text: position[text], reverse=True)
        num_held = math.ceil(HELD_OUT_SHARE * len(ranked))
        split_of = {text: SPLITS[max(2 - i // num_held, 0)] for i, text in enumerate(ranked)}
    return {split: [text for text in documents if split_of[text] == split] for split in SPLITS}


def _pieces(parts: list[str], num_chars: int) -> Iterator[str]:
    """The document, whose parts are used up, in pieces of at most `num_chars`, each ending with a paragraph, else a line,
    else a word."""
    rest, middle = "", num_chars // 2
    parts.reverse()
    while parts:
        text, start = rest + parts.pop(), 0
        while len(text) - start > num_chars:
            low, high = start + middle, start + num_chars
            ends = (text.rfind(mark, low, high - len(mark)) + len(mark) for mark in ("\n\n", "\n", " "))
            end = next((end for end in ends if end > low), high)
            if not text[start:end].isspace():
                yield text[start:end]
            start = end
        rest = text[start:]
    if rest.strip():
        yield rest


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
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
    """.npy, uint16 or uint32 [num_blocks, context]"""
    fingerprint: str
    """Hex; equal for equal text, tokenizer, context and split, on every machine."""

    @functools.cached_property
    def tokens(self) -> NDArray[np.unsignedinteger]:
        """Memory-mapped, read-only, [num_blocks, context]."""
        return np.load(self.path, mmap_mode="r")

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
        num_blocks = len(self.tokens)
        positions = range(start, start + num_sequences)
        return self.batch([int(self.order(seed, p // num_blocks)[p % num_blocks]) for p in positions])


@functools.lru_cache(maxsize=4)
def _permutation(num: int, seed: int, epoch: int) -> NDArray[np.int64]:
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    permutation = np.random.RandomState(bits).permutation(num)  # frozen by numpy's NEP 19; Generator's is not
    permutation.flags.writeable = False
    return permutation


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int, split: str,
         cache_dir: Path | None = None, say: Say = quiet) -> Blocks:
    """The documents of one split in blocks of `context` tokens: in order, an end of text behind each, no tail.

    Made once and cached under a hash of the text, the tokenizer, `context` and `split`; two processes may make the same
    file at once. Raises ValueError when the split fills no block.
    """
    check_tokenizer(tokenizer, 2**32)
    fingerprint = _fingerprint(documents, tokenizer, context, split)
    path = (cache_dir or default_cache_dir()) / "blocks" / f"{fingerprint}.npy"
    if not path.is_file():
        stream = _token_stream(documents, tokenizer, say)
        num_tokens = sum(map(len, stream))
        if num_tokens < context:
            raise ValueError(f"the corpus's {split} split must fill one block of {context} tokens, got {num_tokens} tokens; "
                             "give more text or a shorter context")
        _write_array(path, stream, (num_tokens // context, context))
    return Blocks(path.resolve(), fingerprint)


def _fingerprint(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int, split: str) -> str:
    digest = hashlib.sha256()
    for part in (f"{FORMAT_VERSION} {context} {split}", _tokenizer_json(tokenizer), *documents):
        data = part.encode("utf-8", "replace")
        digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()[:32]


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides how text becomes ids."""
    if tokenizer.is_fast:
        return f"{tokenizer.eos_token_id} {tokenizer.backend_tokenizer.to_str()}"
    return f"{tokenizer.eos_token_id} {type(tokenizer).__name__} {json.dumps(tokenizer.get_vocab(), sort_keys=True)}"


def _token_stream(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, say: Say) -> list[NDArray[np.unsignedinteger]]:
    """In parts: joined they would take their memory twice."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    total = sum(map(len, documents)) / 1e6
    batches = progress(_batches(documents), say,
                       lambda num_chars: f"corpus: {num_chars / 1e6:,.0f} of {total:,.0f} M characters tokenized")
    stream = []
    for batch in batches:
        ids = (each for text_ids in token_ids(tokenizer, batch, False) for each in (text_ids, [tokenizer.eos_token_id]))
        stream.append(np.fromiter(itertools.chain.from_iterable(ids), dtype))
    return stream


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        batch.append(text)
        num_chars += len(text)
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def token_ids(tokenizer: Any, texts: Sequence[str], special: bool | None) -> list[Sequence[int]]:
    """tokenizer(texts), by the shortest way through a fast tokenizer: on all cores, ids and nothing else."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None and fast.padding is None and fast.truncation is None and not tokenizer.split_special_tokens:
        return [encoding.ids for encoding in fast.encode_batch_fast(list(texts), add_special_tokens=special is not False)]
    options = {} if special is None else {"add_special_tokens": special}
    return tokenizer(list(texts), return_attention_mask=False, verbose=False, **options)["input_ids"]  # type: ignore[no-any-return]


def _write_array(path: Path, parts: Sequence[NDArray[np.unsignedinteger]], shape: tuple[int, int]) -> None:
    """Writes what of the parts fills the shape, in the bytes of np.save: aside, fsynced and moved, so that a reader sees no
    file or the whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            header = {"descr": parts[0].dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            num_left = shape[0] * shape[1]
            for part in parts:
                file.write(part[:num_left].tobytes())
                num_left -= min(num_left, len(part))
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
