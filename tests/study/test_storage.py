"""One contract for a local folder and a store: whole or not at all, the same names, the same errors."""

import contextlib
import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from s3 import SECRET

from raysearch.cluster.doctor import check_store
from raysearch.study.files import new_directory, new_file, write_json
from raysearch.study.ledger import Ledger
from raysearch.study.storage import AnyPath, StorePath, as_file, check_bucket, location, pull, push


def test_paths_are_those_of_pathlib(store: StorePath, tmp_path: Path) -> None:
    seen = []
    for root in (store, tmp_path / "x"):
        assert not root.exists()
        assert list(root.glob("*")) == []
        write_json(root / "rounds" / "k1" / "record.json", {"a": 1})
        (root / "rounds" / "k1" / "weights.bin").write_bytes(b"123")
        write_json(root / "rounds" / ".k2" / "record.json", {})
        write_json(root / "lock", {})
        assert root.is_dir()
        assert not root.is_file()
        (found,) = (root / "rounds").glob("[!.]*/record.json")
        assert found.parent.name == "k1"
        assert json.loads(found.read_text()) == {"a": 1}
        assert abs(found.stat().st_mtime - time.time()) < 60
        weights = root / "rounds" / "k1" / "weights.bin"
        weights.replace(weights.with_suffix(".damaged"))
        assert not weights.exists()
        for act in (weights.unlink, weights.read_bytes, weights.stat):
            with pytest.raises(FileNotFoundError) as error:
                act()
            assert str(error.value.filename) == str(weights)
        weights.unlink(missing_ok=True)
        seen.append((sorted(path.name for path in root.iterdir()), sorted(
            (path.name, path.stem, path.suffixes, path.stat().st_size) for path in (root / "rounds").glob("*/*"))))
    assert seen[0] == seen[1]
    assert str(store / "a" / "b.json") == str(location(str(store / "a" / "b.json")))
    assert location(str(store / "rounds" / "k1" / "record.json")).read_text() == '{\n "a": 1\n}'


# ---- the contract of every place ----


def test_what_was_never_written_is_not_there(anywhere: AnyPath) -> None:
    for path in (anywhere, anywhere / "a.json"):
        assert (path.exists(), path.is_file(), path.is_dir()) == (False, False, False)
    assert list(anywhere.glob("*")) == list(anywhere.glob("*/*")) == []
    with pytest.raises(ValueError, match="no such study directory"):
        Ledger.open(anywhere)


def rename(path: AnyPath) -> None:
    path.replace(path.with_suffix(".new"))


@pytest.mark.parametrize("act", [lambda path: path.read_bytes(), lambda path: path.read_text(), lambda path: path.stat(),
                                 lambda path: path.unlink()], ids=["read_bytes", "read_text", "stat", "unlink"])
def test_a_missing_file_is_named(anywhere: AnyPath, act: Callable[[AnyPath], object]) -> None:
    write_json(anywhere / "other.json", {})
    missing = anywhere / "rounds" / "record.json"
    with pytest.raises(FileNotFoundError) as error:
        act(missing)
    assert (error.value.errno, str(error.value.filename)) == (errno.ENOENT, str(missing))
    missing.unlink(missing_ok=True)
    assert [path.name for path in anywhere.iterdir()] == ["other.json"]


def test_a_missing_file_that_should_replace_another_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        rename(tmp_path / "a.json")
    assert str(error.value.filename) == str(tmp_path / "a.json")


def test_a_missing_object_that_should_replace_another_is_named(store: StorePath) -> None:
    with pytest.raises(FileNotFoundError) as error:
        rename(store / "a.json")
    assert str(error.value.filename) == str(store / "a.json")


@pytest.mark.parametrize("size_bytes", [0, 1, 100_000])
def test_bytes_come_back_with_their_size(anywhere: AnyPath, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    with new_file(anywhere / "a.bin") as file:
        file.write_bytes(data)
    assert (anywhere / "a.bin").read_bytes() == data
    assert (anywhere / "a.bin").stat().st_size == size_bytes
    assert abs((anywhere / "a.bin").stat().st_mtime - time.time()) < 60
    assert [path.stat().st_size for path in anywhere.glob("*.bin")] == [size_bytes]
    (anywhere / "a.bin").write_bytes(b"other")
    assert (anywhere / "a.bin").read_text() == "other"


def test_a_file_is_replaced_whole_or_not_at_all(anywhere: AnyPath) -> None:
    path = anywhere / "a.json"
    write_json(path, {"version": 1})
    with new_file(path) as file:
        file.write_text("second")
        assert json.loads(path.read_bytes()) == {"version": 1}  # until the block ends
    assert path.read_text() == "second"
    with pytest.raises(KeyboardInterrupt), new_file(path) as file:
        file.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"loss": float("nan")})
    assert path.read_text() == "second"
    assert [each.name for each in anywhere.iterdir()] == ["a.json"]


def test_a_directory_appears_whole_or_not_at_all_and_the_first_one_stays(anywhere: AnyPath) -> None:
    path = anywhere / "rounds" / "k1"
    with pytest.raises(RuntimeError, match="boom"), new_directory(path) as folder:
        (folder / "record.json").write_text("half")
        raise RuntimeError("boom")
    assert not path.exists()
    for text in ("first", "second"):
        with new_directory(path) as folder:
            (folder / "weights.bin").write_text(text)
            (folder / "record.json").write_text(text)
            assert (path / "record.json").is_file() == (text == "second")
    assert {each.name: each.read_text() for each in path.iterdir()} == {"weights.bin": "first", "record.json": "first"}
    assert [each.name for each in (anywhere / "rounds").iterdir()] == ["k1"]


def test_one_name_takes_the_place_of_another(anywhere: AnyPath) -> None:
    for name in ("a.bin", "b.bin"):
        (anywhere / "x").mkdir(parents=True, exist_ok=True)
        (anywhere / "x" / name).write_bytes(name.encode())
    (anywhere / "x" / "a.bin").replace(anywhere / "x" / "b.bin")
    assert [(path.name, path.read_text()) for path in anywhere.glob("*/*")] == [("b.bin", "a.bin")]


def test_listings_take_patterns_of_one_depth(anywhere: AnyPath) -> None:
    for name in ("study.json", "rounds/k1/record.json", "rounds/.k2/record.json", "rounds/k1/report.json", "trials/00001.json",
                 "trials/00001.rank-0.log"):
        write_json(anywhere / name, {})
    assert anywhere.is_dir()
    wanted = {"*.json": ["study.json"], "rounds/[!.]*/record.json": ["rounds/k1/record.json"],
              "rounds/*/record.json": ["rounds/.k2/record.json", "rounds/k1/record.json"],
              "trials/[0-9]*.json": ["trials/00001.json"],
              "*/00001.*": ["trials/00001.json", "trials/00001.rank-0.log"], "*/*.bin": []}
    for pattern, names in wanted.items():
        assert sorted(map(str, anywhere.glob(pattern))) == [str(anywhere / name) for name in names]
    assert sorted(path.name for path in anywhere.iterdir()) == ["rounds", "study.json", "trials"]


def test_a_local_file_has_the_content_for_as_long_as_the_block(anywhere: AnyPath) -> None:
    write_json(anywhere / "a.json", {"a": 1})
    with as_file(anywhere / "a.json") as local:
        assert isinstance(local, Path)
        assert (local.name, json.loads(local.read_text())) == ("a.json", {"a": 1})
    assert (anywhere / "a.json").is_file()
    assert local.exists() == isinstance(anywhere, Path)  # a download is deleted


def test_what_is_appended_to_a_working_copy_is_there_once_it_is_pushed(anywhere: AnyPath) -> None:
    write_json(anywhere / "other.json", {})
    log = anywhere / "a.log"
    for line in ("one\n", "two\n"):
        with open(pull(log), "a") as file:
            file.write(line)
        push(log)
    assert log.read_text() == "one\ntwo\n"
    assert pull(log).read_text() == "one\ntwo\n"


# ---- what only a store must do ----


def test_objects_are_whole(store: StorePath, tmp_path: Path) -> None:
    data = os.urandom(22_345_678)  # three parts of an upload
    with new_file(store / "big") as file:
        file.write_bytes(data)
    with as_file(store / "big") as local:
        assert local.read_bytes() == data
    assert not local.exists()
    with pytest.raises(RuntimeError, match="boom"), new_file(store / "big") as file:
        file.write_bytes(b"half")
        raise RuntimeError("boom")
    assert (store / "big").stat().st_size == len(data)

    def interrupt(number: int, frame: object) -> None:
        raise SystemExit(number)

    (tmp_path / "new").write_bytes(b"new" * 5_000_000)
    (tmp_path / "newer").write_bytes(b"newer")
    before = signal.signal(signal.SIGALRM, interrupt)
    delays_ms = [("new", 5.0), ("new", 50.0), ("new", 100.0), *(("newer", 0.1 * step) for step in range(1, 100))]
    for name, delay_ms in delays_ms:
        signal.setitimer(signal.ITIMER_REAL, delay_ms / 1000)
        with contextlib.suppress(SystemExit, RuntimeError):  # the second comes of a lock that was interrupted
            (store / "big").upload(tmp_path / name)
            time.sleep(0.1)
        assert (store / "big").stat().st_size in (len(data), 15_000_000, 5)
    signal.signal(signal.SIGALRM, before)

    log = store / "a.log"
    pull(log).write_text("")
    push(log)
    with open(pull(log), "a") as file:
        file.write("more")
    push(log)
    assert log.read_text() == "more"


def test_a_file_uri_is_a_local_path(tmp_path: Path) -> None:
    assert location(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert location("studies/x") == Path("studies/x").resolve()


@pytest.mark.parametrize(("uri", "sentence"), [
    (f"s3://KEY:{SECRET}@bucket/x", "a URI must hold no credentials.*environment .on S3 AWS_ACCESS_KEY_ID"),
    (f"s3://KEY:a/{SECRET}@bucket/x", "a URI must hold no credentials"),
    (f"gs://{SECRET}@bucket/x", "a URI must hold no credentials"),
    (f"s3://bucket/x?secret_key={SECRET}", "a URI must hold no credentials"),
    (f"abfs://container@account.dfs.core.windows.net/x?sas_token={SECRET}", "a URI must hold no credentials"),
    ("ftp://host/x", "ftp://host/x: pyarrow cannot open it.*give a folder, or a URI such as s3://"),
    ("s3://bucket/x?endpoint=localhost", "pyarrow cannot open it .*endpoint"),
    ("s3:///x", "pyarrow cannot open it|names no bucket"),
    ("s3://", "names no bucket"),
    (Path("s3://bucket/x"), "s3:/bucket/x: only a study's directory can be a URI"),
])
def test_uris_that_cannot_be_used(uri: str | Path, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        location(uri)
    assert SECRET not in str(error.value)


def test_refusals_are_one_sentence(s3: str, store: StorePath, refusing_store: Callable[[float], None]) -> None:
    query = f"endpoint_override={s3}&scheme=http"
    missing = location(f"s3://nowhere/x?{query}") / "a"
    with pytest.raises(OSError, match="the bucket does not exist; create it") as error:
        missing.write_bytes(b"x")
    assert error.value.filename == str(missing)
    with pytest.raises(ValueError, match="no such study directory"):
        Ledger.open(f"s3://nowhere/x?{query}")
    with pytest.raises(OSError, match="the store does not answer; check endpoint_override"):
        (location("s3://bucket/x?endpoint_override=127.0.0.1:1&scheme=http") / "a").read_bytes()
    refusing_store(60)
    with pytest.raises(OSError, match="the store refuses these credentials, or there are none; give them in the environment"):
        (store / "a").write_bytes(b"x")
    with pytest.raises(OSError, match="the store refuses these credentials"):
        (store / "a").read_bytes()
    check = check_store(store)
    assert (check.level, "the store refuses these credentials" in check.text) == ("problem", True)


def test_a_store_that_refuses_to_write_and_a_bucket_that_is_none_are_told_apart(store: StorePath, s3: str,
                                                                              refused_writes: list[str]) -> None:
    (store / "a").write_bytes(b"1")
    refused_writes += ["PUT", "POST", "DELETE"]
    sentence = "the store refuses to write here; give these credentials the right to put and to delete objects"
    for write in (lambda: (store / "a").write_bytes(b"2"), (store / "a").unlink, lambda: (store / "a").replace(store / "b")):
        with pytest.raises(OSError, match=sentence):
            write()
    assert (store / "a").read_bytes() == b"1"
    check_bucket(store)
    check_bucket(Path("anywhere"))
    with pytest.raises(ValueError, match="s3://nowhere/x.*: the bucket does not exist; create it, or mend the URI"):
        check_bucket(location(f"s3://nowhere/x?endpoint_override={s3}&scheme=http"))
