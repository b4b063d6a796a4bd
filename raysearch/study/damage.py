"""What a study has lost: files that are damaged, missing or none of its own. Commands name them and go on, a sweep makes them
again.

Records carry their own checksum, and the hashes of the other files of their candidate. On a store, and beyond MAX_BYTES, only
whether those files are there is looked at: what loads them checks them anyway.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from raysearch.study.files import file_sha256, unsealed
from raysearch.study.ledger import WEIGHTS, Ledger
from raysearch.study.records import JournalSeal, ReportRecord, RoundRecord, TrialRecord
from raysearch.study.storage import AnyPath

MAX_BYTES = 256 * 2**20
"""Of files that are hashed at each look: half a second."""
CREATE_STUDY = 0
"""Optuna's code of a journal's first line."""


class Damage(NamedTuple):
    path: AnyPath
    what: str
    """One sentence that names the file."""
    key: str | None = None
    """The candidate whose file it is."""
    is_stranger: bool = False
    """Not one of the study's files: it is left where it is."""


def summarised(sentences: Iterable[str]) -> Iterator[str]:
    """One line for what more than 3 sentences say, each of another file of one name."""
    alike: dict[tuple[str, str], list[str]] = {}
    for sentence in sentences:
        path, _, rest = sentence.partition(": ")
        alike.setdefault((path.rpartition("/")[2], rest), []).append(path)
    for (name, rest), paths in alike.items():
        for path in paths if len(paths) <= 3 else [f"{paths[0]} and {len(paths) - 1} more {name}"]:
            yield f"{path}: {rest}"


def find_damage(ledger: Ledger, trials: Sequence[TrialRecord], rounds: Mapping[str, RoundRecord],
                reports: Mapping[str, ReportRecord], is_driver: bool = False) -> list[Damage]:
    """What is wrong with the study. `trials` (controls too), `rounds` and `reports` are what the ledger has just read. Of what
    a driver may be writing just now nothing is said, save to that driver itself."""
    directory = ledger.directory
    found = [*_of_candidates(ledger, trials, rounds, reports)]
    if isinstance(directory, Path) and has_copies(ledger) and (is_driver or not ledger.driver()[0]):
        found += [*_of_journal(ledger), *_of_copies(ledger, record_names(trials, rounds, reports))]
    pick = directory / "pick.json"
    try:
        if pick.is_file():
            unsealed(pick.read_bytes(), strict=True)
    except ValueError as error:
        found.append(Damage(pick, f"{pick}: is damaged ({error}); pick again"))
    found += [Damage(path, what, path.parent.name if path.parent.parent == directory / "rounds" else None)
              for path, what in ledger.damaged.items()]
    found += [Damage(path, f"{path}: is no record of this study, and is left out", is_stranger=True)
              for path in ledger.strangers]
    return list({str(each.path): each for each in sorted(found, key=lambda each: str(each.path))}.values())


def _of_journal(ledger: Ledger) -> Iterator[Damage]:
    path, seal_path = ledger.directory / "journal.log", ledger.directory / "journal.json"
    if path.is_file() and not seal_path.is_file():
        yield Damage(seal_path, f"{seal_path}: is missing; the next sweep makes it again")
    seal = ledger.seal()
    wrong = (journal_damage(path.read_bytes(), seal) if path.is_file() else "is missing") if seal else ""
    if wrong:
        yield Damage(path, f"{path}: {wrong}; the next sweep makes it again from the records")


def record_names(trials: Iterable[TrialRecord], rounds: Iterable[str], reports: Iterable[str]) -> list[str]:
    """Of all records that are written twice."""
    return ["study.json", "pick.json", "latency.json", *(f"trials/{trial.number:05d}.json" for trial in trials),
            *(f"rounds/{key}/record.json" for key in rounds), *(f"rounds/{key}/report.json" for key in reports)]


def has_copies(ledger: Ledger) -> bool:
    """False for a study from before there were copies and seals, also where a newer driver has just attached to it."""
    return any(copy.stem != "study" for copy in ledger.matching("copies", "*.json"))


def _of_copies(ledger: Ledger, names: Iterable[str]) -> Iterator[Damage]:
    for name in names:
        path, copy = ledger.twins(name)
        wrong = ""
        try:
            unsealed(copy.read_bytes(), strict=True)
        except (FileNotFoundError, IsADirectoryError):
            wrong = "is missing" if path.is_file() else ""
        except ValueError as error:
            wrong = f"is damaged ({error})"
        if wrong:
            yield Damage(copy, f"{copy}: {wrong}; the next sweep makes it again from the record itself")


def journal_damage(content: bytes, seal: JournalSeal | None) -> str:
    """What is wrong with Optuna's journal; "" for nothing."""
    if not content:
        return "is empty"
    if line := damaged_line(content):
        return f"is damaged in line {line}"
    if seal and hashlib.sha256(content[:seal.num_bytes]).hexdigest() != seal.sha256:
        return "is damaged (its checksum is another one)"
    return ""


def damaged_line(content: bytes) -> int | None:
    """Number of the first line of a journal that is none of Optuna's, or creates the study again; None for a whole journal.
    A torn last line would swallow the next writer's."""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or (number > 1 and entry.get("op_code") == CREATE_STUDY):
            return number
    return None


def _of_candidates(ledger: Ledger, trials: Sequence[TrialRecord], rounds: Mapping[str, RoundRecord],
                   reports: Mapping[str, ReportRecord]) -> Iterator[Damage]:
    named = {key: trial.name for trial in trials for key in trial.keys}
    if named:
        named.setdefault(ledger.study().root_key, "every trial")
    for key in sorted(named.keys() - rounds.keys()):
        lost = ledger.round_directory(key) / "record.json"
        yield Damage(lost, ledger.damaged.get(lost) or f"{lost}: is missing, and {named[key]} names it; the next sweep "
                     "computes it again", key)
    budget = MAX_BYTES
    present = {(path.parent.name, path.name): path for path in (ledger.directory / "rounds").glob("[!.]*/*")}
    for key, record in rounds.items():
        report = reports.get(key)
        expected = {"items.selection.npz": record.items_sha256, WEIGHTS: record.weights_sha256,
                    "items.report.npz": report.items_sha256 if report else None}
        if (key, "recovered.json") in present and (recovered := ledger.recovered(key)):
            expected |= recovered.sha256
        for name, sha256 in expected.items():
            path = present.get((key, name))
            is_deleted = name == WEIGHTS and (key, ledger.deleted_path(key).name) in present
            if sha256 and not is_deleted and (path is None or (isinstance(path, Path) and not path.is_file())):
                lost = ledger.round_directory(key) / name
                yield Damage(lost, f"{lost}: is missing; the next sweep computes it again", key)
            elif isinstance(path, Path) and sha256 and (budget := budget - path.stat().st_size) > 0 and (
                    file_sha256(path) != sha256):
                yield Damage(path, f"{path}: is damaged (its checksum is another one); the next sweep computes it again", key)
        if report is None and (key, "items.report.npz") in present:
            lost = ledger.round_directory(key) / "report.json"
            yield Damage(lost, ledger.damaged.get(lost) or f"{lost}: is missing, and its items are there; the next sweep "
                         "scores the candidate again", key)
