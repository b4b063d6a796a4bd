"""A study's files on an object store: any URI that pyarrow opens, behind the part of pathlib.Path that the ledger uses.

An object appears whole or not at all, so what a local file needs (written aside, fsynced, moved) a PUT does by itself. Local
paths never come here. The URI, its query included, is the name of everything: it is in records, messages and Ray's
arguments, so it must hold no credentials; those come from the environment, ~/.aws or the machine's role.
"""

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

SECRET_NAMES = re.compile("secret|token|password|signature|sas|access_key|account_key", re.IGNORECASE)
"""In a URI's query: parameters that hold a credential."""
WITH_USERS = ("abfs", "abfss", "hdfs", "viewfs")
"""Schemes whose URIs name a container or an account before the @."""
CHUNK_BYTES = 16 * 2**20
NO_BUCKET = "the bucket does not exist; create it, or mend the URI"
CREDENTIALS = ("give them in the environment (on S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), in a file (~/.aws) or by the "
               "machine's role")
REASONS = (
    ("NO_SUCH_BUCKET|[Bb]ucket '.*' not found", NO_BUCKET),
    ("ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN|HTTP status 40[13]|OAuth2 access token"
     "|PERMISSION_DENIED",
     f"the store refuses these credentials, or there are none; {CREDENTIALS}"),
    ("NETWORK_CONNECTION|curlCode", "the store does not answer; check endpoint_override, the region and the network"),
)
"""Of pyarrow's error texts: what they mean and the way out."""


@dataclass(frozen=True)
class StorePath:
    """A folder or an object of a store. OSError with `filename` and one sentence as `strerror` where the store refuses."""

    root: str
    """The URI that was given."""
    inside: str = ""
    """Path below it."""
    listed: Any = field(default=None, compare=False, repr=False)
    """What the listing that found it said of it: pyarrow.fs.FileInfo."""

    @property
    def filesystem(self) -> Any:
        """pyarrow.fs.FileSystem."""
        return _open(self.root)[0]

    @property
    def path(self) -> str:
        """As `filesystem` takes it."""
        return str(self._pure)

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(_open(self.root)[1], self.inside)

    def __str__(self) -> str:
        parts = urlsplit(self.root)
        return parts._replace(path=str(PurePosixPath(parts.path or "/", self.inside))).geturl()

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(self.root, str(PurePosixPath(self.inside, name)))

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def stem(self) -> str:
        return self._pure.stem

    @property
    def suffixes(self) -> list[str]:
        return self._pure.suffixes

    @property
    def parent(self) -> "StorePath":
        """Of a path below the root."""
        return StorePath(self.root, str(PurePosixPath(self.inside).parent))

    def with_suffix(self, suffix: str) -> "StorePath":
        return StorePath(self.root, str(PurePosixPath(self.inside).with_suffix(suffix)))

    def exists(self) -> bool:
        return self._kind() != "NotFound"

    def is_file(self) -> bool:
        return self._kind() == "File"

    def is_dir(self) -> bool:
        return self._kind() == "Directory"

    def stat(self) -> SimpleNamespace:
        """st_size in bytes, st_mtime in the store's clock; of a path from `glob`, what the listing said."""
        info = self.listed or self._info()
        if info.type.name == "NotFound":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return SimpleNamespace(st_size=info.size, st_mtime=info.mtime.timestamp())

    def mkdir(self, **_: bool) -> None:
        """Nothing: a store has no folders, only names with slashes."""

    def iterdir(self) -> Iterator["StorePath"]:
        return iter(self._list(recursive=False))

    def glob(self, pattern: str) -> Iterator["StorePath"]:
        """Objects only; no ** in `pattern`."""
        depth = len(PurePosixPath(pattern).parts)
        for path in self._list(recursive=depth > 1):
            inside = PurePosixPath(path.inside).relative_to(self.inside)
            if len(inside.parts) == depth and inside.match(pattern) and path.listed.is_file:
                yield path

    def read_bytes(self) -> bytes:
        with self._named(), self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        self._put(data)

    def download(self, local: Path) -> None:
        with self._named(), self.filesystem.open_input_stream(self.path) as stream, open(local, "wb") as file:
            shutil.copyfileobj(stream, file, CHUNK_BYTES)

    def upload(self, local: Path) -> None:
        self._put(local)

    def _put(self, source: bytes | Path) -> None:
        """In a thread of its own, where no signal raises and which needs nothing of this one's: a stream that an exception
        closes makes an object of what it has so far. (pyarrow.fs.copy_files ignores errors of the last request.)"""

        def put() -> None:
            with (io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file, self._named(writes=True),
                  self.filesystem.open_output_stream(self.path) as stream):
                shutil.copyfileobj(file, stream, CHUNK_BYTES)

        with ThreadPoolExecutor(1) as thread:
            thread.submit(put).result()

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(FileNotFoundError) if missing_ok else contextlib.nullcontext(), self._named(writes=True):
            self.filesystem.delete_file(self.path)

    def replace(self, target: "StorePath") -> None:
        with self._named(writes=True):
            self.filesystem.move(self.path, target.path)

    def _info(self) -> Any:
        with self._named():
            return self.filesystem.get_file_info(self.path)

    def _kind(self) -> str:
        return str(self._info().type.name)

    def _list(self, recursive: bool) -> list["StorePath"]:
        import pyarrow.fs

        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        with self._named():
            infos = self.filesystem.get_file_info(selector)
        above = PurePosixPath(_open(self.root)[1])
        return [StorePath(self.root, str(PurePosixPath(info.path).relative_to(above)), info) for info in infos]

    @contextlib.contextmanager
    def _named(self, writes: bool = False) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from None
        except OSError as error:
            if "NO_SUCH_KEY" in str(error):  # a move, which pyarrow makes of a copy, says it so
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from None
            reason = _reason(error)
            if writes and CREDENTIALS in reason:
                with contextlib.suppress(OSError):  # unless reading is refused as well
                    self.filesystem.get_file_info(self.path)
                    reason = "the store refuses to write here; give these credentials the right to put and to delete objects"
            raise OSError(errno.EIO, reason, str(self)) from error


def check_bucket(path: "AnyPath") -> None:
    """ValueError where the bucket of a store does not exist, which reading below it does not tell."""
    if isinstance(path, StorePath):
        with contextlib.suppress(OSError):  # not everybody who may write below it may ask for the bucket
            if path.filesystem.get_file_info(path.path.split("/")[0]).type.name == "NotFound":
                raise ValueError(f"{path}: {NO_BUCKET}")


def _reason(error: Exception) -> str:
    return next((sentence for pattern, sentence in REASONS if re.search(pattern, str(error))), str(error))


@functools.cache
def _open(uri: str) -> tuple[Any, str]:
    """(filesystem, path) of a URI; on S3 an object of up to 10 MB is one PUT, which leaves nothing behind when killed."""
    import pyarrow.fs

    parts = urlsplit(uri)
    delayed = [parts.query] * bool(parts.query) + ["allow_delayed_open=true"] * (parts.scheme == "s3")
    filesystem, path = pyarrow.fs.FileSystem.from_uri(parts._replace(query="&".join(delayed)).geturl())
    return filesystem, path


AnyPath = Path | StorePath


def location(given: str | AnyPath) -> AnyPath:
    """An absolute local path or, for a URI, a StorePath; ValueError of one sentence for a URI that cannot be used."""
    if isinstance(given, StorePath):
        return given
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(given)) is None:
        return Path(given).resolve()
    if isinstance(given, Path):  # which has made one slash of two
        raise ValueError(f"{given}: only a study's directory can be a URI, given as text; give a local path here")
    parts = urlsplit(given)
    if parts.scheme == "file":
        return Path(unquote(parts.path)).resolve()
    user = given.partition("://")[2].partition("?")[0].rpartition("@")[0]  # a secret may hold a slash, which urlsplit obeys
    if (":" in user or (parts.username not in (None, "anonymous") and parts.scheme not in WITH_USERS)
            or any(SECRET_NAMES.search(name) for name, _ in parse_qsl(parts.query))):
        raise ValueError(f"{parts.scheme}://...: a URI must hold no credentials, for records and logs name it; {CREDENTIALS}")
    root = parts._replace(path=parts.path.rstrip("/"), fragment="").geturl()
    try:
        path = StorePath(root).path
    except OSError as error:
        raise ValueError(f"{given}: {_reason(error)}") from error
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise ValueError(f"{given}: pyarrow cannot open it ({error}); give a folder, or a URI such as s3://BUCKET/studies/NAME "
                         "or gs://BUCKET/studies/NAME") from error
    if path == ".":
        raise ValueError(f"{given}: names no bucket; give a URI such as s3://BUCKET/studies/NAME")
    return StorePath(root)


@contextlib.contextmanager
def as_file(path: AnyPath) -> Iterator[Path]:
    """A local file with the content of `path`: itself, or a download that is deleted after the block."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="raysearch-") as folder:
        path.download(Path(folder) / path.name)
        yield Path(folder) / path.name


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Of this process, deleted at its end; what it holds after a kill stays in the system's temporary folder."""
    return tempfile.TemporaryDirectory(prefix="raysearch-")


def working_copy(path: AnyPath) -> Path:
    """A local file to append to: `path` itself, or this process's copy of the object, which `push` uploads."""
    if isinstance(path, Path):
        return path
    return Path(_own_folder().name) / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}-{path.name}"


def pull(path: AnyPath) -> Path:
    """The working copy of `path`, with the content of the object where there is one."""
    local = working_copy(path)
    if isinstance(path, StorePath):
        local.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.download(local)
    return local


def push(path: AnyPath) -> None:
    """Uploads the working copy of `path`, whole; nothing to do for a local path."""
    if isinstance(path, StorePath):
        path.upload(working_copy(path))
