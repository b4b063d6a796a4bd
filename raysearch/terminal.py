"""What all commands share: the application, options, what they print while they work, and how they refuse."""

import errno
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from raysearch.config import Study

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Search over pruning schedules for GPT language models.")
Out = Annotated[Path, typer.Option(help="Directory to write to.")]
StudyDir = Annotated[str, typer.Argument(help="Directory of a study, or its URI.", metavar="DIR")]
TextField = Annotated[str, typer.Option(help="Field or column of the corpus that holds the text.")]
StudyOut = Annotated[str | None, typer.Option(help="Study directory or a URI, s3://BUCKET/PATH; studies/NAME by default.")]
SILENT_S = 8.0
now: dict[str, Any] = {}
"""Of the command that runs: what it is "doing", since when ("began"), when it "said" something."""


def doing(what: str) -> None:
    """From now on the command is never silent for long."""
    now.update(doing=what, began=time.monotonic(), said=time.monotonic())


def keep_talking(ended: threading.Event) -> None:
    """A line whenever a command that said what it is doing was silent for SILENT_S, in a long run for a twentieth of it."""
    while not ended.wait(0.5):
        if now and time.monotonic() - now["said"] > max(SILENT_S, (time.monotonic() - now["began"]) / 20):
            now["said"] = time.monotonic()
            print(f"[{now['said'] - now['began']:4.0f} s] still {now['doing']}", file=sys.__stdout__, flush=True)


def sentence(error: Exception) -> str:
    """What was given, the rule and the way out; an OSError has only the first two."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    path = str(error.filename or "a file")
    denied = error.errno in (errno.EACCES, errno.EPERM) and not os.path.exists(path)  # else it was to be read
    if denied or error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
        cache = os.environ.get("RAYSEARCH_CACHE") or str(Path("~/.cache/raysearch").expanduser())
        place = "set RAYSEARCH_CACHE to a folder" if path.startswith(cache) else "give a place with --out"
        return f"{path}: cannot be written ({error.strerror}); {place} that can be"
    return f"{path}: {error.strerror}"


def check_file(path: Path | None, option: str) -> None:
    """ValueError unless a file can be written there, before hours are spent on what it shall hold."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ValueError(f"{option} must be a file in a folder that exists and can be written, got {path}")


def fail(sentence: str, code: int = 2) -> None:
    print(f"raysearch: {sentence}", file=sys.stderr)
    sys.exit(code)


def echo(line: str) -> None:
    print(line, flush=True)
    now.update(said=time.monotonic()) if now else None


def check_study(study: "Study") -> None:
    """ValueError for what is mistyped in it, before the imports that take seconds."""
    from raysearch.evaluation.names import check_names

    check_names(study.model.path, study.evaluation.tasks, study.data.corpus, study.data.text_field)


def warn_of(damage: Sequence[str]) -> None:
    """Of files of a study that are damaged or missing; what is left is shown."""
    from raysearch.study.damage import summarised

    for what in summarised(damage):
        print(f"raysearch: warning: {what}", file=sys.stderr)


def comma_separated(text: str, option: str) -> tuple[str, ...]:
    """The names in an option, each once."""
    names = tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if not names:
        raise ValueError(f"{option} must be names with commas between them, got {text!r}")
    return names


def default_directory(space: str) -> str:
    return f"studies/{space.rpartition('.')[2]}"
