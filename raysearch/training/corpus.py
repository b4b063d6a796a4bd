"""A corpus becomes documents: Python's own documentation, files, folders of `datasets`, data sets of the hub."""

import ast
import functools
import glob
import os
import pydoc_data.topics
import re
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from raysearch.study.text import COMPRESSIONS, first_line, json_array, json_lines, open_text, plain_suffix
from raysearch.training.chats import MESSAGES, chat_document
from raysearch.training.texts import Part, Texts

if TYPE_CHECKING:
    import datasets

END_OF_TEXT = "<|endoftext|>"
SEPARATOR = re.compile(f"^{re.escape(END_OF_TEXT)}$", re.MULTILINE)
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:.*)?")
PLAIN = (".txt", ".json", ".jsonl")
SUFFIXES = (*PLAIN, ".parquet", *(plain + compression for plain in PLAIN for compression in COMPRESSIONS))
ENDINGS = f"{', '.join((*PLAIN, '.parquet'))} (but for the last also compressed: {', '.join(COMPRESSIONS)})"
CHUNK_CHARS = 2**20
PARQUET_ROWS = 1024  # that are in memory at a time
PROGRESS_S = 3.0
MIN_DOCSTRING_CHARS = 200
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}

Say = Callable[[str], object]
"""Takes a line that a person reads."""


def quiet(line: str) -> None:
    """Says nothing."""


def load_documents(corpus: str, field: str = "text", say: Say = quiet) -> Texts:
    """The documents of a corpus that are not blank, in a fixed order.

    `corpus` is "builtin" (Python's own documentation and the docstrings of its standard library); a file, folder or
    glob of .txt (documents separated by a line <|endoftext|>), .jsonl, .json or .parquet (the texts in `field`), the first
    three also compressed (.gz, .bz2, .xz, .zst); a folder that `datasets` saved; or a Hugging Face dataset as NAME or
    NAME:CONFIG. Of a dataset with splits the train split is read. A row may hold a chat instead, in `field` or, where it has
    no text there, in `messages`. Raises ValueError of one sentence.
    """
    parts = map(_whole, _builtin_documents()) if corpus == "builtin" else _parts(corpus, field)
    documents = Texts.of(progress(parts, say, lambda num_bytes: f"corpus {corpus}: {num_bytes / 1e6:,.0f} MB of text read"))
    if not documents:
        raise ValueError(f"corpus {corpus}: holds no text; give one with at least a few thousand words")
    return documents


def check_corpus(corpus: str, field: str = "text") -> None:
    """ValueError of one sentence where there is no such corpus, or its first file does not begin with text; the hub is not
    asked."""
    if corpus != "builtin":
        for file in _files(corpus)[:1]:
            next(_file_parts(file, field), None)


def progress(parts: Iterable[Part], say: Say, line: Callable[[int], str]) -> Iterator[Part]:
    """The parts; every PROGRESS_S it says what `line` makes of the bytes so far, as UTF-8."""
    num_bytes, said = 0, time.monotonic()
    for part in parts:
        yield part
        num_bytes += len(part[0].encode("utf-8", "replace"))
        if time.monotonic() > said + PROGRESS_S:
            said = time.monotonic()
            say(line(num_bytes))


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
    """The files that a path, folder or glob names, of a file and its compressed copy the file; empty when it reads like a
    dataset's name."""
    path = Path(corpus.strip() or "/nowhere").expanduser()
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"corpus {corpus}: a file must end in {ENDINGS}, got {path.name}")
        return [path]
    if (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and (path / "dataset_info.json").is_file()):
        return [path]  # as `save_to_disk` of datasets leaves them
    if path.is_dir() or glob.has_magic(corpus):
        pattern = str(path / "**" / "*") if path.is_dir() else str(path)
        files = sorted(path for name in glob.glob(pattern, recursive=True)
                       if (path := Path(name)).is_file() and name.endswith(SUFFIXES))
        files = [file for file in files if file.suffix not in COMPRESSIONS or file.with_suffix("") not in files]
        if not files:
            raise ValueError(f"corpus {corpus}: no file that ends in {ENDINGS} in it")
        return files
    if corpus.endswith(SUFFIXES) or not HUB_NAME.fullmatch(corpus) or ("/" in corpus and path.parent.is_dir()):
        raise ValueError(f"corpus {corpus!r}: no such file or folder; give a path that exists, a Hugging Face dataset "
                         'name, or "builtin"')
    return []


def _parts(corpus: str, field: str) -> Iterator[Part]:
    files = _files(corpus)
    if not files:
        yield from map(_whole, _column(f"corpus {corpus}", _dataset(corpus), field))
    for file in files:
        yield from _file_parts(file, field)


def _file_parts(file: Path, field: str) -> Iterator[Part]:
    where, suffix = f"corpus {file}", plain_suffix(file)
    if file.is_dir():
        yield from map(_whole, _column(where, _saved_dataset(file), field))
    elif suffix == ".parquet":
        yield from map(_whole, _parquet_documents(file, field))
    elif suffix == ".txt":
        yield from _plain_parts(file)
    else:
        for place, row in _json_rows(file, where):
            yield from map(_whole, _row_document(row, field, place))


def _whole(text: str) -> Part:
    return text, True


def _plain_parts(file: Path) -> Iterator[Part]:
    """Not by lines: one may be the whole file."""
    longest = len(END_OF_TEXT) + 1
    with open_text(file, f"corpus {file}") as stream:
        rest = ""
        while chunk := stream.read(CHUNK_CHARS):
            text = rest + chunk
            line = text.rfind("\n") + 1
            cut = line if len(text) - line < 2 * longest else len(text) - longest  # what is left on each side is no separator
            rest = text[cut:]
            yield from _separated(text[:cut])
        yield from _separated(rest)
        yield "", True


def _separated(text: str) -> Iterator[Part]:
    *texts, last = SEPARATOR.split(text)
    yield from map(_whole, texts)
    yield last, False


def _json_rows(file: Path, where: str) -> Iterator[tuple[str, Any]]:
    """(where it is, row): JSON lines, or one JSON array."""
    if plain_suffix(file) == ".json":
        with open_text(file, where) as stream:
            first = next(filter(str.strip, iter(lambda: stream.read(100), "")), "")
        if first.lstrip().startswith("["):
            yield from ((f"{where}, row {number}", row) for number, row in enumerate(json_array(file, where), start=1))
            return
    yield from ((f"{where}, line {number}", row) for number, row in json_lines(file, where))


def _row_document(row: Any, field: str, where: str) -> Iterator[str]:
    """Its text or its chat, unless that is null."""
    fields = row if isinstance(row, dict) else {}
    value = fields.get(field) if fields.get(field) is not None else fields.get(MESSAGES)
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(message, dict) for message in value)):
        yield from _document(value, where)
    elif value is not None or field not in fields:
        got = (f"a {type(row).__name__}" if not isinstance(row, dict) else f"a {type(value).__name__} in it"
               if value is not None else f"the fields {', '.join(row) or 'of an empty object'}")
        raise ValueError(f"{where}: every row needs a field `{field}` with a string or null, got {got}; {FIELD_ADVICE}")


def _document(value: Any, where: str) -> Iterator[str]:
    """Of a text or a list of messages; none of what is empty."""
    if value:
        yield value if isinstance(value, str) else chat_document(value, where)


FIELD_ADVICE = "name the field that holds the text with --text-field, or text_field in STUDY"


def _parquet_documents(file: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            where = f"corpus {file}"
            column = _column_of(where, {each.name: each.type for each in table.schema_arrow}, field)
            for batch in table.iter_batches(PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    yield from _document(value.as_py(), where)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"corpus {file}: cannot be read as Parquet ({first_line(error)}); write it again") from error


def _column(where: str, data: "datasets.Dataset", field: str) -> Iterator[str]:
    column = _column_of(where, {name: feature.dtype if hasattr(feature, "dtype") else feature
                                for name, feature in data.features.items()}, field)
    return (document for value in data[column] for document in _document(value, where))


def _column_of(where: str, types: dict[str, Any], field: str) -> str:
    """The column of the texts or the chats."""
    column = field if field in types or MESSAGES not in types else MESSAGES
    if not COLUMNS.match(str(types.get(column))):
        got = f"`{column}` of {types[column]}" if column in types else f"the columns {', '.join(types)}"
        raise ValueError(f"{where}: needs a column `{field}` of strings, got {got}; {FIELD_ADVICE}")
    return column


COLUMNS = re.compile(r"(dictionary<values=)?(large_)?string|(large_)?list<\w+: struct<|(Large)?List\(\{")
"""Types of texts and of chats, in the words of Arrow and of datasets."""


def _saved_dataset(folder: Path) -> "datasets.Dataset":
    """Of `save_to_disk`."""
    try:
        data = _quiet_datasets().load_from_disk(str(folder))
    except Exception as error:  # Arrow's, json's and those of datasets
        raise ValueError(f"corpus {folder}: cannot be read as a folder that datasets saved ({first_line(error)}); save it "
                         "again") from error
    if isinstance(data, dict):
        if "train" not in data:
            raise ValueError(f"corpus {folder}: has no split `train`, but {', '.join(data)}; give the folder of one of them")
        data = data["train"]
    return data


def _dataset(corpus: str) -> "datasets.Dataset":
    name, _, config = corpus.partition(":")
    try:
        return _quiet_datasets().load_dataset(name, config or None, split="train")
    except Exception as error:  # the hub's client, fsspec and the readers each raise their own kinds
        raise ValueError(f"corpus {corpus}: neither a file or folder here nor a Hugging Face dataset that loads "
                         f'({first_line(error)}); check the name and the network, or use "builtin"') from error


def _quiet_datasets() -> ModuleType:
    """datasets without bars and log lines: what it has to say is in its exceptions."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets
