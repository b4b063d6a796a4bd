"""Text files as people bring them. What corpora and tasks make of them: tests/training/test_corpus.py, test_tasks.py."""

import gzip
import json
from pathlib import Path

import pytest

import raysearch.study.text
from raysearch.study.text import json_array, json_lines, open_text, plain_suffix


def test_lines_end_with_a_line_feed_and_keep_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"a": "x\u2028y\u0085z"}\r\n \n[1]'.encode())
    assert list(json_lines(file)) == [(1, {"a": "x\u2028y\u0085z"}), (3, [1])]
    file.write_bytes(b'{"a": 1}\n{"a": }\n')
    with pytest.raises(ValueError, match=f"^{file}, line 2: is not JSON .Expecting value at column 7., got '{{\"a\": }}'; "):
        list(json_lines(file))
    with pytest.raises(ValueError, match="^--option x, line 2: is not JSON"):
        list(json_lines(file, "--option x"))


def test_a_mark_of_utf_8_stays_in_a_text_and_goes_from_json(tmp_path: Path) -> None:
    for name, text in (("a.txt", "\ufeff[]"), ("a.json", "[]"), ("a.txt.gz", "\ufeff[]")):
        data = b"\xef\xbb\xbf[]"
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        with open_text(tmp_path / name) as opened:
            assert opened.read() == text
        assert plain_suffix(tmp_path / name) == f".{name.split('.')[1]}"


@pytest.mark.parametrize(("name", "data"), [
    ("a.gz", b"plain"), ("a.zst", b"plain"), ("a.xz", b"\xfd7zXZ\x00"), ("a.bz2", b"BZh9"), ("gone.txt", None)])
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"^{tmp_path / name}: cannot be read .*; mend the file") as caught, \
            open_text(tmp_path / name) as opened:
        opened.read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk_chars", [1, 7, 10**6])
def test_an_array_is_read_value_by_value_as_json_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          chunk_chars: int) -> None:
    monkeypatch.setattr(raysearch.study.text, "CHUNK_CHARS", chunk_chars)
    file = tmp_path / "a.json"
    values = [{"text": "a, ]\n\u2028 \U0001f600 é" * 3}, 123, -1.5e3, True, None, [1, [2]], {}, "x"]
    for given in (values, [], [12], values * 20):
        for indent in (None, 1):
            file.write_text(" \n" + json.dumps(given, ensure_ascii=bool(indent), indent=indent) + "\n ")
            assert list(json_array(file, "it")) == given
    for torn, place in (("[1, 2", "column 6"), ("[1,, 2]", "column 4"), ("[1 2]", "column 4"), ("[", "column 2"),
                        ("[1] 2", "column 5"), ("[1,\n]", "line 2, column 1"), ('[{"a": 1},\n{"b"}]', "line 2, column 5")):
        file.write_text(torn)
        with pytest.raises(ValueError, match=f"it: is not JSON .* at .*{place}"):
            list(json_array(file, "it"))
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="it: is nested too deeply"):
        list(json_array(file, "it"))
