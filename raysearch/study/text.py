"""Text files that people bring: plain or compressed, in an encoding that their first bytes tell, read line by line."""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""Byte order marks; that of UTF-32, little end first, begins with UTF-16's."""


def _binary(file: Path) -> Any:
    if file.suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(file), compression="zstd")
    modules: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
    return modules.get(file.suffix, io).open(file, "rb")


def plain_suffix(file: Path) -> str:
    """Suffix of the file without that of its compression."""
    return file.with_suffix("").suffix if file.suffix in COMPRESSIONS else file.suffix


def _encoding(file: Path) -> str:
    """By the first bytes: UTF-8, or UTF-16 and 32 where a byte order mark, or the zeros in JSON, tell them."""
    with _binary(file) as stream:
        head = stream.read(4)
    if plain_suffix(file) == ".txt" and not head.startswith(MARKS):
        return "utf-8"  # a mark of UTF-8 stays in the text: keys of studies hold it
    return str(json.detect_encoding(head))


@contextlib.contextmanager
def open_text(file: Path, where: str = "", newline: str | None = None) -> Iterator[TextIO]:
    """The file as text. What goes wrong while the block reads is a ValueError of one sentence that begins with `where`, the
    file itself by default, and names the line of a byte that is no text."""
    where = where or str(file)
    try:
        encoding = _encoding(file)
        with _binary(file) as stream, io.TextIOWrapper(stream, encoding=encoding, newline=newline) as text:
            yield text
    except UnicodeDecodeError:
        with _binary(file) as stream:
            line, byte = _undecodable(stream.read(), encoding)
        raise ValueError(f"{where}, line {line}: must be UTF-8 text, or UTF-16 or 32 with a byte order mark, got byte "
                         f"{byte:#04x}; convert the file") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{where}: cannot be read ({reason}); mend the file, or its compression") from error


def _undecodable(data: bytes, encoding: str) -> tuple[int, int]:
    """(line, value) of the first byte that cannot be decoded; 1 where the stream ends inside a character."""
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        return data[:error.start].decode(encoding, "replace").count("\n") + 1, data[error.start]
    raise AssertionError("decodes as a whole, but not in parts")


def json_lines(file: Path, where: str = "") -> Iterator[tuple[int, Any]]:
    """(number, value) of each line that is not blank. Only a line feed ends a line: JSON may hold any other separator of
    Unicode in a string. ValueError names file and line."""
    with open_text(file, where) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.isspace():
                yield number, parse_json(line, f"{where or file}, line {number}")


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{where}: is not JSON ({error.msg} at {line}column {error.colno}), got {text.strip()[:60]!r}; mend "
                         "or remove it") from None
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply to be data; mend or remove it") from None


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough for a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
