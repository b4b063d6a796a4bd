"""Text: a corpus becomes documents, three splits, a tokenizer, and packed blocks of tokens in a memory-mapped file."""

import ast
import bisect
import functools
import glob
import hashlib
import json
import math
import os
import pydoc_data.topics
import re
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raysearch.study.files import default_cache_dir

if TYPE_CHECKING:
    import datasets


END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
FORMAT_VERSION = 1  # of the packed files; a change makes every cached file stale
MIN_DOCSTRING_CHARS = 200
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


def load_documents(corpus: str) -> list[str]:
    """The non-empty documents of a corpus, in a fixed order.

    `corpus` is "builtin" (Python's own documentation and the docstrings of its standard library); a file, folder or
    glob of .txt (documents separated by a line <|endoftext|>), .jsonl, .json or .parquet (a field `text`); or a Hugging
    Face dataset as NAME or NAME:CONFIG, of which the train split is read. Raises ValueError of one sentence.
    """
    if corpus == "builtin":
        return list(_builtin_documents())
    files = _files(corpus)
    found = [text for file in files for text in _read_file(file)] if files else _read_dataset(corpus)
    documents = [text for text in found if text.strip()]
    if not documents:
        raise ValueError(f"corpus {corpus}: holds no text; give one with at least a few thousand words")
    return documents


@functools.cache
def _builtin_documents() -> tuple[str, ...]:
    documents = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - NOT_LIBRARY)
        for name in sorted(names):
            if name.endswith(".py"):
                try:
                    tree = ast.parse((Path(folder) / name).read_bytes())
                except (SyntaxError, ValueError):  # templates and samples that are no Python
                    continue
                documents += _docstrings(tree)
    return tuple(dict.fromkeys(documents))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text and len(text) >= MIN_DOCSTRING_CHARS:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def _files(corpus: str) -> list[Path]:
    """The files that a path, folder or glob names; empty when it reads like a dataset's name."""
    path = Path(corpus).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"corpus {corpus}: a file must end in {', '.join(SUFFIXES)}, got {path.name}")
        return [path]
    if path.is_dir() or glob.has_magic(corpus):
        pattern = str(path / "**" / "*") if path.is_dir() else str(path)
        files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if name.endswith(SUFFIXES))
        if not files:
            raise ValueError(f"corpus {corpus}: no file that ends in {', '.join(SUFFIXES)} in it")
        return files
    if corpus.endswith(SUFFIXES) or corpus.startswith(("/", ".", "~")) or corpus.count("/") > 1 or not corpus.strip():
        raise ValueError(f"corpus {corpus!r}: no such file or folder; give a path that exists, a Hugging Face dataset "
                         'name, or "builtin"')
    return []


def _read_file(file: Path) -> list[str]:
    try:
        if file.suffix == ".parquet":
            return _read_parquet(file)
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"corpus {file}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus {file}: must be UTF-8 text, got byte {error.object[error.start]:#04x} "
                         f"at {error.start}; convert it") from error
    if file.suffix == ".txt":
        return re.split(f"^{re.escape(END_OF_TEXT)}$", text, flags=re.MULTILINE)
    return _read_json(file, text)


def _read_json(file: Path, text: str) -> list[str]:
    """JSON lines, or one JSON array."""
    array = file.suffix == ".json" and text.lstrip().startswith("[")
    texts = []
    for number, line in enumerate([text] if array else text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"corpus {file}: line {error.lineno if array else number} is not JSON ({error.msg}); "
                             "repair or remove it") from error
        for row in value if array else [value]:
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                fields = f"the fields {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
                raise ValueError(f"corpus {file}: every row needs a field `text` with a string, got {fields} "
                                 f"in line {number}; rename the field that holds the text")
            texts.append(row["text"])
    return texts


def _read_parquet(file: Path) -> list[str]:
    datasets = _quiet_datasets()
    with tempfile.TemporaryDirectory() as aside:  # datasets would keep an Arrow copy in its own cache
        try:
            data = datasets.Dataset.from_parquet(str(file), cache_dir=aside, keep_in_memory=True)
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:  # Arrow's are ValueErrors
            reason = _first_line(error.__cause__ or error)
            raise ValueError(f"corpus {file}: cannot be read as Parquet ({reason}); write it again") from error
        return _text_column(str(file), data)


def _read_dataset(corpus: str) -> list[str]:
    name, _, config = corpus.partition(":")
    try:
        data = _quiet_datasets().load_dataset(name, config or None, split="train")
    except Exception as error:  # the hub's client, fsspec and the readers each raise their own kinds
        raise ValueError(f"corpus {corpus}: neither a file or folder here nor a Hugging Face dataset that loads "
                         f'({_first_line(error)}); check the name and the network, or use "builtin"') from error
    return _text_column(corpus, data)


def _quiet_datasets() -> ModuleType:
    """datasets without bars and log lines: what it has to say is in its exceptions."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _text_column(corpus: str, data: "datasets.Dataset") -> list[str]:
    if "text" not in data.column_names or data.features["text"].dtype not in ("string", "large_string"):
        raise ValueError(f"corpus {corpus}: needs a column `text` of strings, got {', '.join(data.column_names)}; "
                         "rename the column that holds the text")
    return [text for text in data["text"] if text]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
    if len(documents) < MIN_DOCUMENTS_TO_SPLIT:
        low, high = PIECE_CHARS
        num_chars = min(max(sum(map(len, documents)) // MIN_DOCUMENTS_TO_SPLIT, low), high)
        documents = [piece for document in documents for piece in _pieces(document, num_chars)]
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


def _pieces(document: str, num_chars: int) -> Iterator[str]:
    """The document in pieces of at most `num_chars`, each ending with a paragraph, else a line, else a word."""
    while len(document) > num_chars:
        ends = (document.rfind(mark, num_chars // 2, num_chars - len(mark)) + len(mark) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > num_chars // 2), num_chars)
        if document[:end].strip():
            yield document[:end]
        document = document[end:]
    if document.strip():
        yield document


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


def pack(
    corpus: str, tokenizer: PreTrainedTokenizerBase, context: int, split: str, cache_dir: Path | None = None
) -> Blocks:
    """One split of a corpus in blocks of `context` tokens: documents in order, an end of text behind each, no tail.

    Made once and cached under a hash of the text, the tokenizer, `context` and `split`; two processes may make the same
    file at once. Raises ValueError when the split fills no block.
    """
    check_tokenizer(tokenizer, 2**32)
    documents = split_documents(load_documents(corpus))[split]
    fingerprint = _fingerprint(documents, tokenizer, context, split)
    path = (cache_dir or default_cache_dir()) / "blocks" / f"{fingerprint}.npy"
    if not path.is_file():
        stream = _token_stream(documents, tokenizer)
        num_blocks = len(stream) // context
        if not num_blocks:
            raise ValueError(f"corpus {corpus}: its {split} split must fill one block of {context} tokens, got "
                             f"{len(stream)} tokens; give more text or a shorter context")
        _write_array(path, stream[: num_blocks * context].reshape(num_blocks, context))
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


def _token_stream(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> NDArray[np.unsignedinteger]:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    stream = []
    for start in range(0, len(documents), 256):
        batch = tokenizer(list(documents[start : start + 256]), add_special_tokens=False, verbose=False,
                          return_attention_mask=False)["input_ids"]
        stream += [np.array([*ids, tokenizer.eos_token_id], dtype=dtype) for ids in batch]
    return np.concatenate(stream)


def _write_array(path: Path, array: NDArray[np.unsignedinteger]) -> None:
    """Writes aside, fsyncs and moves: a reader sees no file or the whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
