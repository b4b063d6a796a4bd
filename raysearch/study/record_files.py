"""The files of a study's records: JSON that ends with its own checksum, and stands once more in copies/."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from raysearch.frozen import Frozen, FrozenT
from raysearch.study.files import T, new_file, persist, unsealed, write_record
from raysearch.study.storage import AnyPath, location

NUM_READERS = 16
"""Threads that read a store's records, each of which is a request."""


class Unreadable(ValueError):
    """A record that is missing, damaged or of another kind; the message names the file."""


class RecordFiles:
    """Reads and writes the records below one directory.

    Who asks for all records gets those that can be read: the others are noted in `damaged`, and a sweep makes them again. Who
    asks for one by its name gets it or a ValueError that names the file.
    """

    def __init__(self, directory: str | AnyPath) -> None:
        self.directory = location(directory)
        self.damaged: dict[AnyPath, str] = {}
        """Files that were found damaged, with a sentence on each."""
        self.strangers: set[AnyPath] = set()
        """Files among the records that have no name of a record's."""

    def twins(self, name: str) -> tuple[AnyPath, AnyPath]:
        """(file, its copy) of a record."""
        copy = name.removeprefix("trials/").removeprefix("rounds/").replace("/", ".")
        return self.directory / name, self.directory / "copies" / copy

    def is_there(self, name: str) -> bool:
        return any(path.is_file() for path in self.twins(name))

    def known(self, name: str, read: Callable[[AnyPath], T]) -> T | None:
        """What `read` makes of a file; None where it and its copy are missing, or damaged, so that it is made again."""
        path = self.directory / name
        return self.readable([path], read).get(path) if self.is_there(name) else None

    def either(self, name: str, read: Callable[[AnyPath], T]) -> T:
        """What `read` makes of a file or, with a note, of its copy."""
        path, copy = self.twins(name)
        try:
            return read(path)
        except Unreadable as error:
            if not copy.is_file():
                raise
            self.damaged[path] = f"{error if path.is_file() else f'{path}: is missing'}; its copy is read instead"
            return read(copy)

    def own(self, name: str, read: Callable[[AnyPath], T], of: Callable[[T], object], wanted: object) -> T:
        """The record of this name; by its own word, `of` it, it must be that of `wanted`."""

        def checked(path: AnyPath) -> T:
            record = read(path)
            if of(record) != wanted:
                raise Unreadable(f"{path}: is the record of {of(record)}, and not of {wanted}")
            return record

        return self.either(name, checked)

    def write_twice(self, name: str, record: Frozen) -> None:
        """The copy second: it never stands for what was not finished."""
        for path in self.twins(name):
            self.write(path, record)

    @staticmethod
    def write(path: AnyPath, record: Frozen) -> None:
        persist(path, lambda: write_record(path, record))

    def restore(self, names: Iterable[str]) -> None:
        """Writes each of these records, or its copy, from the other one, where that is whole."""
        for name in names:
            twins = self.twins(name)
            contents = [whole_content(path) for path in twins]
            for path, content, other in zip(twins, contents, reversed(contents)):
                if content is None and other is not None:
                    with new_file(path) as file:
                        file.write_bytes(other)

    def readable(self, paths: Iterable[AnyPath], read: Callable[[AnyPath], T]) -> dict[AnyPath, T]:
        """What `read` makes of each path, without the damaged ones, which are noted."""

        def attempt(path: AnyPath) -> T | None:
            try:
                return read(path)
            except Unreadable as error:
                self.damaged[path] = str(error)
                return None

        paths = list(paths)
        return {path: record for path, record in zip(paths, self._each(attempt, paths)) if record is not None}

    def matching(self, folder: str, pattern: str) -> list[AnyPath]:
        return sorted((self.directory / folder).glob(pattern), key=str)

    def _each(self, read: Callable[[AnyPath], T], paths: Iterable[AnyPath]) -> list[T]:
        """What `read` makes of each path; on a store, where each is a request, in several threads."""
        if isinstance(self.directory, Path):
            return list(map(read, paths))
        with ThreadPoolExecutor(NUM_READERS) as readers:
            return list(readers.map(read, paths))

    @staticmethod
    def read(path: AnyPath, cls: type[FrozenT]) -> FrozenT:
        """Unreadable where that file holds no such record; ValueError where a store does not answer."""
        try:
            return cls.model_validate_json(unsealed(path.read_bytes()))
        except OSError as error:
            lost = isinstance(path, Path) or isinstance(error, FileNotFoundError)  # a store that does not answer lost nothing
            raise (Unreadable if lost else ValueError)(
                f"{path}: cannot be read ({error.strerror}); is this a study directory?") from error
        except ValueError as error:
            rule = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise Unreadable(f"{path}: not a {cls.__name__} of this version of raysearch ({rule}); it was damaged or made by "
                             "another version") from error


def whole_content(path: AnyPath) -> bytes | None:
    """None for a file that is missing, or damaged so that its checksum says so."""
    try:
        content = path.read_bytes()
        json.loads(unsealed(content))
        return content
    except (FileNotFoundError, ValueError, RecursionError):
        return None
