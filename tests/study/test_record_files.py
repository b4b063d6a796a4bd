from pathlib import Path

import pytest

from raysearch.study.files import write_record
from raysearch.study.record_files import RecordFiles, Unreadable, whole_content
from raysearch.study.records import JournalSeal, MicroBatches
from raysearch.study.storage import AnyPath

RECORD = MicroBatches(tokens={"a": 7})


def written(anywhere: AnyPath) -> RecordFiles:
    files = RecordFiles(anywhere)
    files.write_twice("rounds/k/record.json", RECORD)
    return files


def test_a_damaged_record_is_read_from_its_copy_and_noted(anywhere: AnyPath) -> None:
    files = written(anywhere)
    path, copy = files.twins("rounds/k/record.json")
    assert copy == files.directory / "copies" / "k.record.json"
    path.write_bytes(path.read_bytes().replace(b"7", b"8"))
    assert files.either("rounds/k/record.json", lambda path: files.read(path, MicroBatches)) == RECORD
    assert files.damaged[path].endswith("its copy is read instead")
    files.restore(["rounds/k/record.json"])
    assert path.read_bytes() == copy.read_bytes() == whole_content(path)
    copy.unlink()
    files.restore(["rounds/k/record.json"])
    assert files.read(copy, MicroBatches) == RECORD


def test_of_many_those_are_read_that_can_be(anywhere: AnyPath) -> None:
    files = written(anywhere)
    path, copy = files.twins("rounds/k/record.json")
    other = files.directory / "rounds" / "other" / "record.json"
    write_record(other, JournalSeal(num_bytes=1, sha256="x"))
    assert files.readable([path, other, files.directory / "none.json"], lambda path: files.read(path, MicroBatches)) == {
        path: RECORD}
    assert sorted(where.name for where in files.damaged) == ["none.json", "record.json"]
    assert files.matching("copies", "*.json") == [copy]


def test_a_record_in_anothers_place_is_refused(tmp_path: Path) -> None:
    files = written(tmp_path)
    with pytest.raises(Unreadable, match=r"record.json: is the record of \['a'\], and not of \['b'\]"):
        files.own("rounds/k/record.json", lambda path: files.read(path, MicroBatches), lambda record: [*record.tokens], ["b"])
