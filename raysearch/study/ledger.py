"""The study's durable record: plain files in one directory, each written aside, fsynced and moved into place; or objects
of the same names on a store (storage.py), where a round exists once its record.json, which is uploaded last, does.

    study.json               StudyRecord: settings and versions, written once
    journal.log              Optuna's journal (search/journal.py)
    rounds/KEY/record.json   RoundRecord: one candidate on the selection split
    rounds/KEY/weights.safetensors   its weights, bitmap-compressed (models/weights.py)
    rounds/KEY/items.selection.npz   what it scored on each selection item, from which its metrics come (items.py); of one that
                             a race ended, on the items that were scored
    rounds/KEY/report.json   its metrics on the report split, once they are scored
    rounds/KEY/items.report.npz   what it scored on each item of that split; written before report.json
    trials/NUMBER.json       TrialRecord: which rounds a trial ran, and how it ended
    trials/-0002.json, ...   TrialRecord of a dense control: the longest trial's fine-tuning without pruning
    trials/NUMBER.rank-R.log     what rank R printed during the trial; -0001 is all other jobs
    trials/NUMBER.rank-R.stack   where rank R was when its round took too long
    tune/                    TensorBoard's events, a folder for each trial, and Ray Tune's own files
    lock                     held by the driver that runs the study; on a store a lease (lease.py)

A round is named by its key, a hash of everything that determines it, so two trials with a common prefix share records.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from raysearch.config import FrozenT, Metric
from raysearch.study.files import T, persist, write_json
from raysearch.study.items import Items, read_items, write_items
from raysearch.study.lease import holder, lease
from raysearch.study.records import FORMAT, RoundRecord, StudyRecord, TrialRecord, settings_that_decide_numbers
from raysearch.study.storage import AnyPath, StorePath, location

Split = Literal["selection", "report"]
NUM_READERS = 16
"""Threads that read a store's records, each of which is a request."""


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
        with open(self.directory / "lock", "a+") as file:  # to open it with "w" would erase the name that a refusal tells
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
                file.truncate(0)  # a name that stays is that of a killed driver

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
        changed = []
        if old.root_key != record.root_key:  # how fast and where may change; what the key hashes may not
            before, now = settings_that_decide_numbers(old.study), settings_that_decide_numbers(record.study)
            changed = [f"{name} ({before[section].get(name, 'its default')!r}, now {now[section].get(name, 'its default')!r})"
                       for section in now for name in sorted({*before[section], *now[section]})
                       if before[section].get(name) != now[section].get(name)]
            changed = changed or ["the files of the model, the corpus or the tasks"]
        objectives, now_objectives = old.study.search.objectives, record.study.search.objectives
        if record.study.evaluation.racing_level is not None and objectives != now_objectives:
            changed.append(f"objectives ({', '.join(objectives)}, now {', '.join(now_objectives)}), by which candidates raced")
        if old.space_hash != record.space_hash:
            changed.append("the code of space()")
        if changed:
            raise ValueError(f"{self.directory}: holds another study, which differs in {'; '.join(changed)}; undo the "
                             "change, or give a new directory with --out")
        self.write_study(record.model_copy(update={"provenance": old.provenance}))
        return True

    def study(self) -> StudyRecord:
        """ValueError of one sentence for one of another format, too: its keys would mean something else."""
        path = self.directory / "study.json"
        try:
            raw = json.loads(path.read_bytes())
            written, maker = raw.get("format", 1), raw["provenance"]["versions"].get("raysearch-llm", "of then")
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return self._read(path, StudyRecord)  # which says what is wrong with such a file
        if written != FORMAT:
            raise ValueError(f"{self.directory}: its records are of format {written}, and this raysearch reads and writes "
                             f"format {FORMAT} only; open it with the raysearch-llm that made it ({maker}), or start anew "
                             "with another --out")
        return self._read(path, StudyRecord)

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
        return self._by_key("record.json", lambda path: self._read(path, RoundRecord))

    def items_path(self, key: str, split: Split) -> AnyPath:
        return self.round_directory(key) / f"items.{split}.npz"

    def items(self, key: str, split: Split) -> dict[str, Items] | None:
        """By "task/metric", of every metric that is made of sums over items; None while the split is not scored.
        ValueError for a damaged file."""
        path = self.items_path(key, split)
        return read_items(path) if path.is_file() else None

    def report_metrics(self, key: str) -> dict[str, Metric] | None:
        """Metrics on the report split, or None while they are not scored."""
        path = self.round_directory(key) / "report.json"
        return self._metrics(path) if path.is_file() else None

    def reports(self) -> dict[str, dict[str, Metric]]:
        """Metrics on the report split by key, of the candidates that have them."""
        return self._by_key("report.json", self._metrics)

    @staticmethod
    def _metrics(path: AnyPath) -> dict[str, Metric]:
        return {name: Metric.model_validate(value) for name, value in json.loads(path.read_text()).items()}

    def write_report_metrics(self, key: str, metrics: dict[str, Metric], items: Mapping[str, Items]) -> None:
        """The items first, so that report.json never stands without them."""
        values = {name: metric.model_dump(mode="json") for name, metric in metrics.items()}
        path, items_path = self.round_directory(key) / "report.json", self.items_path(key, "report")
        persist(items_path, lambda: write_items(items_path, items))
        persist(path, lambda: write_json(path, values))

    def trials(self) -> list[TrialRecord]:
        """All trials by number; no controls."""
        paths = self._matching("trials", "[0-9]*.json")
        return sorted(self._each(lambda path: self._read(path, TrialRecord), paths), key=lambda trial: trial.number)

    def controls(self) -> list[TrialRecord]:
        """The dense controls, -2 first: an extended study may have had others before its last."""
        paths = self._matching("trials", "-[0-9]*.json")
        return sorted(self._each(lambda path: self._read(path, TrialRecord), paths), key=lambda control: -control.number)

    def candidate(self, key: str) -> RoundRecord:
        """The record of a round that must be there."""
        return self._read(self.round_directory(key) / "record.json", RoundRecord)

    def trial(self, number: int) -> TrialRecord:
        return self._read(self.directory / "trials" / f"{number:05d}.json", TrialRecord)

    def write_trial(self, trial: TrialRecord) -> None:
        path = self.directory / "trials" / f"{trial.number:05d}.json"
        persist(path, lambda: write_json(path, trial.model_dump(mode="json")))

    def log_path(self, number: int, rank: int) -> AnyPath:
        """Of a trial or a control; -1 is every other job."""
        return self.directory / "trials" / f"{number:05d}.rank-{rank}.log"

    def stack_path(self, number: int, rank: int) -> AnyPath:
        """Of a trial or a control; -1 is every other job."""
        return self.directory / "trials" / f"{number:05d}.rank-{rank}.stack"

    def stacks(self, number: int) -> dict[str, str]:
        """Stack of each rank that found its round of this trial too long, by "rank 0", ..."""
        texts = {path: path.read_text() for path in self._matching("trials", f"{number:05d}.rank-*.stack")}
        return {path.suffixes[0][1:].replace("-", " "): text for path, text in texts.items() if text}

    def _by_key(self, name: str, read: Callable[[AnyPath], T]) -> dict[str, T]:
        paths = self._matching("rounds", f"[!.]*/{name}")  # a folder that begins with a dot is still being written
        return dict(zip((path.parent.name for path in paths), self._each(read, paths)))

    def _matching(self, folder: str, pattern: str) -> list[AnyPath]:
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
