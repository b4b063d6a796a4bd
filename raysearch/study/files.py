"""Files that appear whole or not at all: written aside, fsynced and moved into place, or uploaded to a store."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from raysearch.frozen import Frozen
from raysearch.study.storage import AnyPath, StorePath

T = TypeVar("T")
WRITE_RETRY_S = 3.0
FILE_MODE = 0o644  # temporary files begin as 0600, and a study is read by others


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Refused(OSError):
    """The storage would not write, twice."""


def persist(path: AnyPath, write: Callable[[], T]) -> T:
    """What `write` returns; where the storage refuses, it is tried again once, and then Refused names `path`."""
    try:
        return write()
    except OSError:
        time.sleep(WRITE_RETRY_S)
    try:
        return write()
    except OSError as error:
        raise Refused(f"{path}: cannot be written, twice {WRITE_RETRY_S:g} s apart ({error.strerror or error}); free or mend "
                      "the storage, and the same sweep goes on") from error


@contextlib.contextmanager
def naming(path: AnyPath) -> Iterator[None]:
    """An OSError of the block names `path` where it names no file, as that of a write to an open one, or what is written
    aside for it."""
    try:
        yield
    except OSError as error:
        is_aside = any(part.startswith(f".{path.name}.") for part in Path(str(error.filename)).parts)
        if error.errno is not None and (error.filename is None or is_aside):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def new_file(path: AnyPath) -> Iterator[Path]:
    """A local file to fill; fsynced and moved to `path`, or uploaded to it, when the block ends well, and deleted when it
    raises: a reader sees the old file or the whole new one."""
    if isinstance(path, StorePath):
        with tempfile.TemporaryDirectory(prefix="raysearch-") as folder:
            yield Path(folder) / path.name
            path.upload(Path(folder) / path.name)
        return
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # a move is whole within one file system only
    os.close(handle)
    aside = Path(name)
    try:
        with naming(path):
            yield aside
            settle(aside)
            os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def settle(file: Path) -> None:
    """Readable by others, and on the disk."""
    file.chmod(FILE_MODE)
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def link_or_copy(file: Path, target: Path) -> None:
    """One content under two names, where the filesystem has hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def write_json(path: AnyPath, value: dict[str, Any]) -> None:
    with new_file(path) as file:
        file.write_text(json.dumps(value, indent=1, allow_nan=False))


def write_record(path: AnyPath, record: Frozen) -> None:
    """As JSON whose last field is the sha256 of all that stands before it, so that one changed byte is found."""
    text = json.dumps({**record.model_dump(mode="json"), "checksum": ""}, indent=1, allow_nan=False).removesuffix('"\n}')
    with new_file(path) as file:
        file.write_text(f'{text}{hashlib.sha256(text.encode()).hexdigest()}"\n}}')


def unsealed(content: bytes, strict: bool = False) -> bytes:
    """The JSON of `write_record` without its checksum; ValueError where that is not the content's. JSON without a checksum is
    as it is, unless `strict`: of an earlier version, or written by hand."""
    end = re.search(rb',\n "checksum": "([0-9a-f]{64})"\n}\Z', content[-100:])
    if end is None:
        if strict:
            raise ValueError("it has no checksum")
        return content
    if hashlib.sha256(content[:-len('0"\n}') - 63]).hexdigest().encode() != end[1]:
        raise ValueError("its checksum is another one")
    return content[:-len(end[0])] + b"\n}"


def is_there(path: AnyPath) -> bool:
    """Whether anything has this name: a folder and a link to nothing too."""
    return os.path.lexists(path) if isinstance(path, Path) else path.is_file()


def set_aside(path: AnyPath) -> None:
    """Renames what is damaged to end in .damaged."""
    path.replace(path.with_suffix(".damaged"))  # type: ignore[arg-type]


@contextlib.contextmanager
def folder_aside(path: AnyPath) -> Iterator[Path]:
    """A local folder, beside `path` where that is local, which is deleted at the end."""
    beside = path.parent if isinstance(path, Path) else None
    with naming(path) if isinstance(path, Path) else contextlib.nullcontext():
        if beside:
            beside.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=beside, prefix=f".{path.name}." if beside else "raysearch-"))
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def new_directory(path: AnyPath, mend: bool = False) -> Iterator[Path]:
    """A directory to fill beside `path`; moved to `path` when the block ends well, deleted when it raises. On a store, and to
    `mend` a directory that has lost its record.json, the files are put there one by one, record.json as the last of them.

    Where another process has made `path` in the meantime, its directory stays and this one is deleted. On a store two may
    upload at once; where their weights then differ from the record's checksum, they are computed again as damaged ones are.
    """
    with folder_aside(path) as aside, naming(path):
        yield aside
        if isinstance(path, Path):
            for file in aside.rglob("*"):
                if file.is_file():
                    settle(file)
            aside.chmod(0o755)  # a temporary folder begins as 0700
            try:
                os.replace(aside, path)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        if (mend or isinstance(path, StorePath)) and not (path / "record.json").is_file():
            for file in sorted(aside.iterdir(), key=lambda file: file.name == "record.json"):
                if isinstance(path, StorePath):
                    (path / file.name).upload(file)
                else:
                    os.replace(file, path / file.name)


def default_cache_dir() -> Path:
    """$RAYSEARCH_CACHE, or ~/.cache/raysearch; on a cluster it must be storage that all nodes share."""
    return Path(os.environ.get("RAYSEARCH_CACHE") or "~/.cache/raysearch").expanduser()
