"""The study's durable record: plain files in one directory, each written aside, fsynced and moved into place; or objects
of the same names on a store (storage.py), where a round exists once its record.json, which is uploaded last, does.

    study.json               StudyRecord: settings and versions, written once
    journal.log              Optuna's journal (search.py)
    rounds/KEY/record.json   RoundRecord: one candidate on the selection split
    rounds/KEY/weights.safetensors   its weights, bitmap-compressed (weights.py)
    rounds/KEY/losses.json   in a study with racing: its loss on each selection item of the objective
    rounds/KEY/report.json   its metrics on the report split, once they are scored
    trials/NUMBER.json       TrialRecord: which rounds a trial ran, and how it ended
    trials/NUMBER.rank-R.log     what rank R printed during the trial; -0001 is all other jobs
    trials/NUMBER.rank-R.stack   where rank R was when its round took too long
    tune/                    Ray Tune's own files: TensorBoard's events, results as JSON and CSV, errors
    lock                     held by the driver that runs the study; on a store a lease (lease.py)

A round is named by its key, a hash of everything that determines it, so two trials with a common prefix share records.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from raysearch.config import Action, Frozen, FrozenT, Metric, Study, TrialConfig
from raysearch.lease import holder, lease
from raysearch.storage import AnyPath, StorePath, location

T = TypeVar("T")

WRITE_RETRY_S = 3.0
NUM_READERS = 16
"""Threads that read a store's records, each of which is a request."""
FILE_MODE = 0o644  # temporary files begin as 0600, and a study is read by others
EXTENDABLE = {"num_trials", "max_concurrent", "time_budget_s", "round_limit_s", "gpus_per_rank", "cpus_per_rank"}
"""Settings of a study that may differ when it is resumed: they change no candidate."""


class Provenance(Frozen):
    """Where and with what a number was made."""

    created_at: str
    """UTC, ISO 8601."""
    git_commit: str | None
    versions: dict[str, str]
    device: str
    hostname: str


class StudyRecord(Frozen):
    study: Study
    space: str
    """Import name of the search space module; "prune" for a single trial without search."""
    space_hash: str
    """Hash of the distributions that the space samples from: an edited space is another study."""
    root_key: str
    """Key of the dense baseline's round record."""
    provenance: Provenance


class RoundRecord(Frozen):
    """A candidate: the model after a round, its sizes, and its quality on the selection split."""

    key: str
    parent: str | None
    """Key of the round before; None for the dense baseline."""
    action: Action | None
    """None for the dense baseline."""
    depth: int
    """Rounds since the dense baseline, which has 0."""
    num_parameters: int
    """All parameters; tied weights count once."""
    num_prunable: int
    num_nonzero: int
    """Non-zero parameters among all of them."""
    sparsity: float
    """Zeros among the prunable weights."""
    model_sparsity: float
    """Zeros among all parameters."""
    layer_sparsity: dict[str, float]
    """Sparsity of each prunable tensor."""
    stored_bytes: int
    """Tensor bytes of the compressed export: bitmap and non-zero values where that is smaller, else dense."""
    resident_bytes: int
    """Tensor bytes of the dense export, which transformers keeps in memory when it serves the model."""
    metrics: dict[str, Metric]
    """On the selection split, by "task/metric"."""
    dominated_by: str | None = None
    """Key of a candidate that is no larger and better, as a race on the objective found before all items were scored
    (Study.racing_level). The metrics are then those of the first items only and never final."""
    train_loss: float | None
    """Mean loss of the last tenth of the fine-tuning steps, nats per token; None without fine-tuning."""
    prune_s: float
    finetune_s: float
    evaluate_s: float
    weights_sha256: str | None
    provenance: Provenance


class TrialRecord(Frozen):
    """What a trial was asked and what became of it."""

    number: int
    config: TrialConfig
    actions: tuple[Action, ...]
    """Resolved before the trial ran."""
    keys: tuple[str, ...] = ()
    """Candidates finished so far, in order."""
    status: Literal["running", "done", "stopped", "failed"] = "running"
    reason: str | None = None
    """Why it stopped or failed, in one sentence."""
    traceback: str | None = None
    log_path: str | None = None
    """What rank 0 printed; the other ranks' logs lie beside it."""
    started_at: str
    ended_at: str | None = None
    seconds: float = 0.0


def hash_json(value: object) -> str:
    """First 16 hex digits of the sha256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def round_key(parent_key: str, action: Action) -> str:
    """key(round) = hash(key(parent), canonical action); the root's key already covers model, data and settings."""
    return hash_json([parent_key, action.model_dump()])


def config_hash(study: Study, actions: Sequence[Action]) -> str:
    """Of all that a trial will do: the driver's must be every rank's."""
    return hash_json([study.model_dump(mode="json"), [action.model_dump() for action in actions]])


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def persist(path: AnyPath, write: Callable[[], T]) -> T:
    """What `write` returns; where the storage refuses, it is tried again once, and then OSError names `path`."""
    try:
        return write()
    except OSError:
        time.sleep(WRITE_RETRY_S)
    try:
        return write()
    except OSError as error:
        raise OSError(f"{path}: cannot be written, twice {WRITE_RETRY_S:g} s apart ({error}); free or mend the storage, "
                      "and the same sweep goes on") from error


@contextlib.contextmanager
def new_file(path: AnyPath) -> Iterator[Path]:
    """A local file to fill; fsynced and moved to `path`, or uploaded to it, when the block ends well, and deleted when it
    raises: a reader sees the old file or the whole new one."""
    if isinstance(path, StorePath):
        with tempfile.TemporaryDirectory(prefix="raysearch-") as folder:
            yield Path(folder) / path.name
            path.upload(Path(folder) / path.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    aside = Path(name)
    try:
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


def write_json(path: AnyPath, value: dict[str, Any]) -> None:
    with new_file(path) as file:
        file.write_text(json.dumps(value, indent=1, allow_nan=False))


@contextlib.contextmanager
def folder_aside(path: AnyPath) -> Iterator[Path]:
    """A local folder, beside `path` where that is local, which is deleted at the end."""
    beside = path.parent if isinstance(path, Path) else None
    if beside:
        beside.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=beside, prefix=f".{path.name}." if beside else "raysearch-"))
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def new_directory(path: AnyPath) -> Iterator[Path]:
    """A directory to fill beside `path`; moved to `path` when the block ends well, deleted when it raises. On a store its
    files are uploaded, record.json as the last of them.

    Where another process has made `path` in the meantime, its directory stays and this one is deleted. On a store two may
    upload at once; where their weights then differ from the record's checksum, they are computed again as damaged ones are.
    """
    with folder_aside(path) as aside:
        yield aside
        if isinstance(path, StorePath):
            if not (path / "record.json").is_file():
                for file in sorted(aside.iterdir(), key=lambda file: file.name == "record.json"):
                    (path / file.name).upload(file)
            return
        for file in aside.rglob("*"):
            if file.is_file():
                settle(file)
        aside.chmod(0o755)
        with contextlib.suppress(FileExistsError):
            _move_directory(aside, path)


def _move_directory(source: Path, target: Path) -> None:
    """os.replace, with FileExistsError where `target` is a directory that holds something."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(error.errno, error.strerror, str(target)) from error
        raise


class Ledger:
    """Reads and writes one study directory."""

    def __init__(self, directory: str | AnyPath) -> None:
        self.directory = location(directory)

    @classmethod
    def open(cls, directory: str | AnyPath) -> "Ledger":
        """A ledger that must already hold a study; ValueError otherwise."""
        ledger = cls(directory)
        if not ledger.directory.is_dir():
            raise ValueError(f"{directory}: no such study directory; give the --out of a `raysearch sweep`")
        if not (ledger.directory / "study.json").is_file():
            raise ValueError(f"{directory}: holds no study (study.json is missing); give the --out of a "
                             "`raysearch sweep`")
        ledger.study()
        return ledger

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one driver that may write; a second driver is refused with the name of the first."""
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"{self.directory}: is a file; give a directory with --out")
        if isinstance(self.directory, StorePath):
            with lease(self.directory / "lock"):
                yield
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / "lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(f"{self.directory}: another driver runs this study ({file.read().strip()}); wait for "
                                 "it, or stop it first") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    def driver(self) -> tuple[bool, str]:
        """(whether a driver holds the lock now, the name it wrote); one that was killed leaves its name behind."""
        if isinstance(self.directory, StorePath):
            return holder(self.directory / "lock")[:2]
        try:
            with open(self.directory / "lock") as file:
                if name := file.read().strip():  # else nobody holds it, and a driver that starts now is not disturbed
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False, name
        except FileNotFoundError:
            return False, ""
        except BlockingIOError:
            return True, name

    def attach(self, record: StudyRecord) -> bool:
        """Makes the directory this study's, or compares with the one that is there: True when it is the same study.

        Raises ValueError when the directory holds another study, or something else.
        """
        if not (self.directory / "study.json").is_file():
            others = sorted({path.name for path in self.directory.iterdir()} - {"lock"})
            if others:
                raise ValueError(f"{self.directory}: holds something else ({', '.join(others[:3])}); give a new or empty "
                                 "directory with --out")
            self.write_study(record)
            return False
        old = self.study()
        before, now = old.study.model_dump(), record.study.model_dump()
        changed = [f"{name} ({before[name]!r}, now {now[name]!r})" for name in now
                   if name not in EXTENDABLE and before[name] != now[name]]
        if old.space_hash != record.space_hash:
            changed.append("the code of space()")
        if not changed and old.root_key != record.root_key:
            changed.append("the files of the model, the corpus or the tasks")
        if changed:
            raise ValueError(f"{self.directory}: holds another study, which differs in {'; '.join(changed)}; undo the "
                             "change, or give a new directory with --out")
        self.write_study(record.model_copy(update={"provenance": old.provenance}))
        return True

    def study(self) -> StudyRecord:
        return self._read(self.directory / "study.json", StudyRecord)

    def write_study(self, record: StudyRecord) -> None:
        write_json(self.directory / "study.json", record.model_dump(mode="json"))

    def round_directory(self, key: str) -> AnyPath:
        return self.directory / "rounds" / key

    def weights_path(self, key: str) -> AnyPath:
        return self.round_directory(key) / "weights.safetensors"

    def delete_weights(self, keys: Iterable[str]) -> tuple[int, int]:
        """Deletes the weights of these candidates, damaged copies too, and never a record; (files, bytes) deleted."""
        num_files = num_bytes = 0
        for key in keys:
            for path in self.round_directory(key).glob("weights.*"):
                num_bytes += path.stat().st_size
                path.unlink()
                num_files += 1
        return num_files, num_bytes

    def delete_leftovers(self) -> None:
        """What killed processes had written aside; under the lock, while no gang runs. On a store nothing lies aside."""
        if isinstance(self.directory, Path):
            for folder in (self.directory / "rounds").glob(".*"):
                shutil.rmtree(folder, ignore_errors=True)

    def round(self, key: str) -> RoundRecord | None:
        path = self.round_directory(key) / "record.json"
        return self._read(path, RoundRecord) if path.is_file() else None

    def rounds(self) -> dict[str, RoundRecord]:
        """All candidates by key, the dense baseline included."""
        paths = self._found("rounds", "[!.]*/record.json")
        records = self._each(lambda path: self._read(path, RoundRecord), paths)
        return dict(zip((path.parent.name for path in paths), records))

    def losses(self, key: str) -> list[float]:
        """Of each selection item of the objective, in the order of the task; only in a study with racing."""
        return list(json.loads((self.round_directory(key) / "losses.json").read_text())["losses"])

    def report_metrics(self, key: str) -> dict[str, Metric] | None:
        """Metrics on the report split, or None while they are not scored."""
        path = self.round_directory(key) / "report.json"
        return self._metrics(path) if path.is_file() else None

    def reports(self) -> dict[str, dict[str, Metric]]:
        """Metrics on the report split by key, of the candidates that have them."""
        paths = self._found("rounds", "[!.]*/report.json")
        return dict(zip((path.parent.name for path in paths), self._each(self._metrics, paths)))

    @staticmethod
    def _metrics(path: AnyPath) -> dict[str, Metric]:
        return {name: Metric.model_validate(value) for name, value in json.loads(path.read_text()).items()}

    def write_report_metrics(self, key: str, metrics: dict[str, Metric]) -> None:
        values = {name: metric.model_dump(mode="json") for name, metric in metrics.items()}
        path = self.round_directory(key) / "report.json"
        persist(path, lambda: write_json(path, values))

    def trials(self) -> list[TrialRecord]:
        paths = self._found("trials", "[0-9]*.json")
        return sorted(self._each(lambda path: self._read(path, TrialRecord), paths), key=lambda trial: trial.number)

    def candidate(self, key: str) -> RoundRecord:
        """The record of a round that must be there."""
        return self._read(self.round_directory(key) / "record.json", RoundRecord)

    def trial(self, number: int) -> TrialRecord:
        return self._read(self.directory / "trials" / f"{number:05d}.json", TrialRecord)

    def write_trial(self, trial: TrialRecord) -> None:
        path = self.directory / "trials" / f"{trial.number:05d}.json"
        persist(path, lambda: write_json(path, trial.model_dump(mode="json")))

    def log_path(self, number: int, rank: int) -> AnyPath:
        """Of a trial; -1 is every other job."""
        return self.directory / "trials" / f"{number:05d}.rank-{rank}.log"

    def stack_path(self, number: int, rank: int) -> AnyPath:
        """Of a trial; -1 is every other job."""
        return self.directory / "trials" / f"{number:05d}.rank-{rank}.stack"

    def stacks(self, number: int) -> dict[str, str]:
        """Stack of each rank that found its round of this trial too long, by "rank 0", ..."""
        found = {path: path.read_text() for path in self._found("trials", f"{number:05d}.rank-*.stack")}
        return {path.suffixes[0][1:].replace("-", " "): text for path, text in found.items() if text}

    def _found(self, folder: str, pattern: str) -> list[AnyPath]:
        return sorted((self.directory / folder).glob(pattern), key=str)

    def _each(self, read: Callable[[AnyPath], T], paths: Iterable[AnyPath]) -> list[T]:
        """What `read` makes of each path; on a store, where each is a request, in several threads."""
        if isinstance(self.directory, Path):
            return list(map(read, paths))
        with ThreadPoolExecutor(NUM_READERS) as readers:
            return list(readers.map(read, paths))

    @staticmethod
    def _read(path: AnyPath, cls: type[FrozenT]) -> FrozenT:
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); is this a study directory?") from error
        except ValidationError as error:
            raise ValueError(f"{path}: not a {cls.__name__} of this version of raysearch "
                             f"({error.errors()[0]['msg']}); it was damaged or made by another version") from error
