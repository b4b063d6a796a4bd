"""The study's durable record: plain files in one directory, each written aside, fsynced and moved into place; or objects
of the same names on a store (storage.py), where a round exists once its record.json, which is uploaded last, does.

    study.json               StudyRecord: settings and versions
    copies/                  all records but recovered ones and speeds once more, read where those are damaged or missing:
                             study.json, NUMBER.json, KEY.record.json, KEY.report.json, pick.json
    journal.log              Optuna's journal (search/journal.py)
    journal.json             JournalSeal: what the journal held
    rounds/KEY/record.json   RoundRecord: one candidate on the selection split
    rounds/KEY/weights.safetensors   its weights, bitmap-compressed (models/weights.py)
    rounds/KEY/items.selection.npz   what it scored on each selection item, from which its metrics come (items.py); of one that
                             a race ended, on the items that were scored
    rounds/KEY/report.json   its metrics on the report split, once they are scored
    rounds/KEY/items.report.npz   what it scored on each item of that split; written before report.json
    rounds/KEY/speed.json    SpeedRecord: how fast it was served, of a frontier candidate that `raysearch measure` timed
    rounds/KEY/recovered.json  Recovered: files that were lost and came out with other bits when they were computed again
    rounds/KEY/deleted       says that `--keep` deleted the weights, which are not lost then
    trials/NUMBER.json       TrialRecord: which rounds a trial ran, and how it ended
    trials/-0002.json, ...   TrialRecord of a dense control: the longest trial's fine-tuning without pruning
    trials/NUMBER.rank-R.log     what rank R printed during the trial; -0001 is all other jobs
    trials/NUMBER.rank-R.stack   where rank R was when its round took too long
    latency.json             Latency: times that predicted_ms rests on, of a study that asks for it; with a copy, too
    micro_batches.json       how many tokens at a time fitted a gang's memory, where fewer did than were planned
    tune/                    TensorBoard's events, a folder for each trial, and Ray Tune's own files
    others/NAME.json, ...    OtherRecord: a model of another origin beside the frontier (raysearch add), and its items
    finish/KEY/              Ray Train's checkpoints within the round KEY of raysearch finish, until it is done
    replicas/                a study like this one: a picked candidate's rounds with other seeds (raysearch replicate)
    lock                     held by the driver that runs the study; on a store a lease (lease.py)
    ...damaged               a file as it was found damaged (damage.py), before the sweep made it again

A round is named by its key, a hash of everything that determines it, so two trials with a common prefix share records.
JSON files end with their own checksum, and records hold those of the other files beside them.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from raysearch.config import Metric
from raysearch.study.files import T, file_sha256, persist, unsealed, write_record
from raysearch.study.items import Items, read_items, write_items
from raysearch.study.lock import driver, lock
from raysearch.study.record_files import RecordFiles, Unreadable
from raysearch.study.records import (
    FORMAT,
    OTHER,
    JournalSeal,
    Latency,
    MicroBatches,
    OtherRecord,
    Recovered,
    ReportRecord,
    RoundRecord,
    SpeedRecord,
    StudyRecord,
    TrialRecord,
    settings_that_decide_numbers,
)
from raysearch.study.storage import AnyPath, as_file

Split = Literal["selection", "report"]
WEIGHTS = "weights.safetensors"
KEY = re.compile(r"\w+")
"""No copy that a tool or a person has made of a folder: KEY (1), KEY.old."""


class Ledger(RecordFiles):
    """Reads and writes one study directory."""

    @classmethod
    def open(cls, directory: str | AnyPath) -> "Ledger":
        """A ledger that must already hold a study; ValueError otherwise."""
        ledger = cls(directory)
        if not ledger.directory.is_dir():
            raise ValueError(f"{directory}: no such study directory; give the --out of a `raysearch sweep`")
        if not ledger.holds_study():
            raise ValueError(f"{directory}: holds no study (study.json is missing); give the --out of a `raysearch sweep`")
        ledger.study()
        return ledger

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Held by the one driver that may write (lock.py)."""
        return lock(self.directory)

    def driver(self) -> tuple[bool, str]:
        """(whether a driver holds the lock now, the name it wrote)."""
        return driver(self.directory)

    def micro_batch_tokens(self) -> dict[str, int]:
        """What `remember_micro_batch` wrote, by gang."""
        try:
            file = (self.directory / "micro_batches.json").read_bytes()
            return MicroBatches.model_validate_json(unsealed(file)).tokens
        except (OSError, ValueError):  # no more than a hint is lost
            return {}

    def remember_micro_batch(self, gang: str, tokens: int) -> None:
        """For gangs of this description that start from now on."""
        write_record(self.directory / "micro_batches.json", MicroBatches(tokens=self.micro_batch_tokens() | {gang: tokens}))

    def latency(self) -> Latency | None:
        return self.either("latency.json", lambda path: self.read(path, Latency)) if self.is_there("latency.json") else None

    def attach(self, record: StudyRecord) -> bool:
        """Makes the directory this study's, or compares with the one that is there: True when it is the same study.

        Raises ValueError when the directory holds another study, or something else.
        """
        if not self.holds_study():
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
        if record.study.search.predicts_ms:
            if not old.study.search.predicts_ms:
                changed.append("predicted_ms, which its candidates do not have")
            elif old.study.serving != record.study.serving:
                changed.append(f"serving ({old.study.serving}, now {record.study.serving}), of which predicted_ms is the time")
        if old.space_hash != record.space_hash:
            changed.append("what space() proposes")
        if changed:
            raise ValueError(f"{self.directory}: holds another study, which differs in {'; '.join(changed)}; undo the "
                             "change, or give a new directory with --out")
        self.write_study(record.model_copy(update={"provenance": old.provenance}))
        return True

    def clear(self) -> None:
        """Empties a local study's folder, under the lock, which takes away the rest."""
        for path in self.directory.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()  # type: ignore[arg-type]

    def holds_study(self) -> bool:
        return self.is_there("study.json")

    def study(self) -> StudyRecord:
        """ValueError of one sentence for one of another format, too: its keys would mean something else."""
        record = self.either("study.json", self._study)
        if (record.model_beside and isinstance(self.directory, Path) and not Path(record.study.model.path).exists()
                and (moved := self.directory / record.model_beside).is_dir()):
            return record.model_copy(update={"study": record.study.replaced(path=str(moved.resolve()))})
        return record

    def _study(self, path: AnyPath) -> StudyRecord:
        try:
            raw = json.loads(path.read_bytes())
            written, maker = raw.get("format", 1), raw["provenance"]["versions"].get("raysearch-llm", "of then")
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
            return self.read(path, StudyRecord)  # which says what is wrong with such a file
        if written != FORMAT and isinstance(written, int):
            raise ValueError(f"{self.directory}: its records are of format {written}, and this raysearch reads and writes "
                             f"format {FORMAT} only; open it with the raysearch-llm that made it ({maker}), or start anew "
                             "with another --out")
        return self.read(path, StudyRecord)

    def write_study(self, record: StudyRecord) -> None:
        if isinstance(self.directory, Path):
            record = record.model_copy(update={"model_beside": os.path.relpath(record.study.model.path, self.directory)})
        self.write_twice("study.json", record)

    def round_directory(self, key: str) -> AnyPath:
        return self.directory / "rounds" / key

    def weights_path(self, key: str) -> AnyPath:
        return self.round_directory(key) / WEIGHTS

    def delete_weights(self, keys: Iterable[str]) -> tuple[int, int]:
        """Deletes the weights of these candidates, damaged copies too, and never a record; (files, bytes) deleted."""
        num_files = num_bytes = 0
        for key in keys:
            for path in self.round_directory(key).glob("weights.*"):
                if path.name in (WEIGHTS, "weights.damaged"):
                    num_bytes += path.stat().st_size
                    self.deleted_path(key).write_bytes(b"")
                    path.unlink()
                    num_files += 1
        return num_files, num_bytes

    def deleted_path(self, key: str) -> AnyPath:
        return self.round_directory(key) / "deleted"

    def delete_leftovers(self) -> None:
        """What killed processes had written aside; under the lock, while no gang runs. On a store nothing lies aside."""
        if isinstance(self.directory, Path):
            for folder in (self.directory / "rounds").glob(".*"):
                shutil.rmtree(folder, ignore_errors=True)

    def round(self, key: str) -> RoundRecord | None:
        """None for a damaged one too, so that it is computed again."""
        return self.known(f"rounds/{key}/record.json", self.candidate_of)

    def rounds(self) -> dict[str, RoundRecord]:
        """All candidates by key, the dense baseline included."""
        return self._by_key("record.json", self.candidate_of)

    def candidate_of(self, path: AnyPath) -> RoundRecord:
        """The record in this file, which must be the one of its folder."""
        key = path.parent.name
        return self.own(f"rounds/{key}/record.json", lambda path: self.read(path, RoundRecord), lambda record: record.key, key)

    def expected_sha256(self, record: RoundRecord, name: str) -> str | None:
        """Of a file beside a candidate's record: as it was recovered, or else as the record has it; None where it has none."""
        recovered = self.recovered(record.key)
        if recovered and name in recovered.sha256:
            return recovered.sha256[name]
        if name == self.items_path(record.key, "report").name:
            report = self.report_record(record.key)
            return report.items_sha256 if report else None
        return record.weights_sha256 if name == WEIGHTS else record.items_sha256

    def recovered(self, key: str) -> Recovered | None:
        return self.known(f"rounds/{key}/recovered.json", lambda path: self.read(path, Recovered))

    def speed_path(self, key: str) -> AnyPath:
        return self.round_directory(key) / "speed.json"

    def speeds(self) -> dict[str, SpeedRecord]:
        """Of the candidates and other models that were measured, by key; one whose file is damaged is to be measured again."""
        paths = self.matching("rounds", "[!.]*/speed.json")
        own = self.readable(paths, lambda path: self.read(path, SpeedRecord))
        return {**{path.parent.name: speed for path, speed in own.items()},
                **{other.key: other.speed for other in self.others() if other.speed}}

    def others(self) -> list[OtherRecord]:
        """By name; damaged ones are left out, to be added again."""
        found = self.readable(self.matching("others", "*.json"), lambda path: self.read(path, OtherRecord))
        return sorted(found.values(), key=lambda other: other.name)

    def write_other(self, record: OtherRecord, items: Mapping[Split, Mapping[str, Items]]) -> None:
        for split, of_split in items.items():
            write_items(self.items_path(record.key, split), of_split)
        self.write(self.directory / "others" / f"{record.name}.json", record)

    def items_path(self, key: str, split: Split) -> AnyPath:
        if key.startswith(OTHER):
            return self.directory / "others" / f"{key.removeprefix(OTHER)}.{split}.npz"
        return self.round_directory(key) / f"items.{split}.npz"

    def items(self, key: str, split: Split) -> dict[str, Items] | None:
        """By "task/metric", of every metric that is made of sums over items; None while the split is not scored.
        ValueError for a damaged file."""
        path = self.items_path(key, split)
        return read_items(path) if path.is_file() else None

    def report_metrics(self, key: str) -> dict[str, Metric] | None:
        """Metrics on the report split, or None while they are not scored, or can not be read."""
        report = self.report_record(key)
        return report.metrics if report else None

    def report_record(self, key: str) -> ReportRecord | None:
        return self.known(f"rounds/{key}/report.json", self._report)

    def report_records(self) -> dict[str, ReportRecord]:
        return self._by_key("report.json", self._report)

    def _report(self, path: AnyPath) -> ReportRecord:
        key = path.parent.name

        def read(path: AnyPath) -> ReportRecord:
            try:
                return self.read(path, ReportRecord)
            except Unreadable:
                with contextlib.suppress(ValueError, OSError):  # before reports had checksums, the metrics were the whole file
                    return ReportRecord(metrics=TypeAdapter(dict[str, Metric]).validate_json(path.read_bytes()))
                raise

        return self.own(f"rounds/{key}/report.json", read, lambda report: report.key or key, key)

    def write_report_metrics(self, key: str, metrics: dict[str, Metric], items: Mapping[str, Items]) -> None:
        """The items first, so that report.json never stands without them."""
        items_path = self.items_path(key, "report")
        persist(items_path, lambda: write_items(items_path, items))
        with as_file(items_path) as file:
            record = ReportRecord(key=key, metrics=metrics, items_sha256=file_sha256(file))
        self.write_twice(f"rounds/{key}/report.json", record)

    def trials(self) -> list[TrialRecord]:
        """All trials by number; no controls."""
        return [trial for trial in self._trials() if not trial.is_control]

    def controls(self) -> list[TrialRecord]:
        """The dense controls, -2 first: an extended study may have had others before its last."""
        return [trial for trial in reversed(self._trials()) if trial.is_control]

    def _trials(self) -> list[TrialRecord]:
        paths = self.matching("trials", "*.json")
        names = {path for path in paths if path.name == f"{_number(path):05d}.json"}
        self.strangers |= set(paths) - names
        names |= {self.trial_path(_number(path)) for path in self.matching("copies", "*.json")
                  if re.fullmatch(r"-?\d+", path.stem)}
        return sorted(self.readable(sorted(names, key=str), self._trial).values(), key=lambda trial: trial.number)

    def _trial(self, path: AnyPath) -> TrialRecord:
        return self.own(f"trials/{path.name}", lambda path: self.read(path, TrialRecord), lambda trial: trial.number,
                        _number(path))

    def candidate(self, key: str) -> RoundRecord:
        """The record of a round that must be there."""
        return self.candidate_of(self.round_directory(key) / "record.json")

    def trial_path(self, number: int) -> AnyPath:
        return self.directory / "trials" / f"{number:05d}.json"

    def trial(self, number: int) -> TrialRecord:
        return self._trial(self.trial_path(number))

    def write_trial(self, trial: TrialRecord) -> None:
        self.write_twice(f"trials/{trial.number:05d}.json", trial)

    def seal(self) -> JournalSeal | None:
        return self.known("journal.json", lambda path: self.read(path, JournalSeal))

    def write_seal(self, seal: JournalSeal) -> None:
        self.write(self.directory / "journal.json", seal)

    def log_path(self, number: int, rank: int) -> AnyPath:
        """Of a trial or a control; -1 is every other job."""
        return self.directory / "trials" / f"{number:05d}.rank-{rank}.log"

    def stack_path(self, number: int, rank: int) -> AnyPath:
        """Of a trial or a control; -1 is every other job."""
        return self.directory / "trials" / f"{number:05d}.rank-{rank}.stack"

    def stacks(self, number: int) -> dict[str, str]:
        """Stack of each rank that found its round of this trial too long, by "rank 0", ..."""
        texts = {path: path.read_text() for path in self.matching("trials", f"{number:05d}.rank-*.stack")}
        return {path.suffixes[0][1:].replace("-", " "): text for path, text in texts.items() if text}

    def _by_key(self, name: str, read: Callable[[AnyPath], T]) -> dict[str, T]:
        found = {path.parent.name: path for path in (self.directory / "rounds").glob(f"[!.]*/{name}")}  # .KEY is being written
        found |= {copy.name.partition(".")[0]: copy for copy in (self.directory / "copies").glob(f"*.{name}")}
        keys = {key for key in found if KEY.fullmatch(key)}
        self.strangers |= {path for key, path in found.items() if key not in keys}
        paths = [self.round_directory(key) / name for key in sorted(keys)]
        return {path.parent.name: record for path, record in self.readable(paths, read).items()}


def _number(path: AnyPath) -> int:
    """In the name of a trial's record; 0 where there is none."""
    return int(path.stem) if re.fullmatch(r"-?\d+", path.stem) else 0
