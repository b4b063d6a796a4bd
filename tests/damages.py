"""Random damages to the files of a study: what disks, editors, synchronising tools and people do to them."""

import random
from collections.abc import Callable
from pathlib import Path


def flipped(content: bytes, generator: random.Random) -> bytes:
    where = generator.randrange(len(content))
    return content[:where] + bytes([content[where] ^ 1 << generator.randrange(8)]) + content[where + 1:]


def line_cut(content: bytes, generator: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    del lines[generator.randrange(len(lines))]
    return b"".join(lines)


KINDS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flipped": flipped, "line cut": line_cut, "emptied": lambda content, _: b"", "doubled": lambda content, _: content * 2,
    "removed": lambda content, _: None}


def stored_files(study: Path) -> list[Path]:
    """All that holds something of the study: not its logs, Tune's own files and the lock, which nothing is read from."""
    files = [path for path in sorted(study.rglob("*")) if path.is_file() and path.stat().st_size]
    return [path for path in files if (path.suffix not in (".log", ".stack", ".damaged", ".html") and "tune" not in path.parts)
            or path.name == "journal.log"]


def damage(study: Path, number: int) -> tuple[Path, str]:
    """(file, kind) of the random damage of this number, which is done: each kind is as likely, and each sort of file."""
    generator = random.Random(number)
    by_sort: dict[str, list[Path]] = {}
    for path in stored_files(study):
        by_sort.setdefault(path.parent.name if path.parent.name in ("trials", "copies") else path.name, []).append(path)
    path = generator.choice(by_sort[generator.choice(sorted(by_sort))])
    kind = generator.choice(sorted(KINDS))
    after = KINDS[kind](path.read_bytes(), generator)
    if after is None:
        path.unlink()
    else:
        path.write_bytes(after)
    return path, kind
