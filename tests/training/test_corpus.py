"""Corpora of every kind, on small real files; what cannot be read is one sentence."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tiny_models import story

import raysearch.training.corpus
from raysearch.training.corpus import load_documents as load_texts
from raysearch.training.data import split_documents


def load_documents(corpus: str, field: str = "text") -> list[str]:
    return list(load_texts(corpus, field))


DOCUMENTS = [story(n) for n in range(20)]
LINES = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in DOCUMENTS)


def test_builtin_corpus_is_real_english_and_the_same_twice() -> None:
    documents = load_documents("builtin")
    assert len(documents) > 1500
    assert 1e6 < sum(map(len, documents)) < 4e6
    assert any("The \"import\" statement" in text for text in documents)
    assert load_documents("builtin") == documents
    assert {split: len(texts) > 50 for split, texts in split_documents(load_texts("builtin")).items()} == {
        "train": True, "selection": True, "report": True}


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.json").write_text("\n" + json.dumps([{"text": text} for text in DOCUMENTS], indent=1))
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(str(tmp_path / "a.parquet"))
    assert [text.strip() for text in load_documents(str(tmp_path / "a.txt"))] == DOCUMENTS
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert load_documents(str(tmp_path / name)) == DOCUMENTS
    assert load_documents(str(tmp_path / "a.js*")) == DOCUMENTS * 2
    assert len(load_documents(str(tmp_path))) == 4 * len(DOCUMENTS)


def test_documents_of_a_text_are_cut_at_whole_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file is read in many parts; the line feeds around a separator stay, as in the keys of studies."""
    monkeypatch.setattr(raysearch.training.corpus, "CHUNK_CHARS", 10)
    file = tmp_path / "a.txt"
    file.write_text("one\n<|endoftext|>\ntwo <|endoftext|>\n <|endoftext|>\r\n<|endoftext|>\r\nthree\u2028\x0c.\n<|endoftext|>",
                    newline="")
    assert load_documents(str(file)) == ["one\n", "\ntwo <|endoftext|>\n <|endoftext|>\n", "\nthree\u2028\x0c.\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize(("suffix", "compress"), [
    (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
    (".zst", lambda data: pyarrow.compress(data, "zstd", asbytes=True))])
def test_compressed_files_are_read(tmp_path: Path, name: str, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    plain, packed = tmp_path / name, tmp_path / (name + suffix)
    plain.write_text(LINES)
    packed.write_bytes(compress(plain.read_bytes()))
    texts = load_documents(str(plain))
    assert load_documents(str(packed)) == texts == load_documents(str(tmp_path))  # a copy beside its original counts once
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"corpus {packed}: cannot be read .*; mend the file, or its compression"):
        load_documents(str(packed))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_text_in_another_encoding_of_unicode_is_read(tmp_path: Path, encoding: str) -> None:
    texts = ["Zoë's \u2028 line\u0085, \x7f", "two"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding)
    assert load_documents(str(tmp_path / "a.jsonl")) == texts
    if encoding in ("utf-16", "utf-32"):  # which write a byte order mark: nothing else tells the encoding of a text
        (tmp_path / "a.txt").write_text("Zoë", encoding)
        assert load_documents(str(tmp_path / "a.txt")) == ["Zoë"]


def test_nulls_are_left_out_and_half_characters_mended(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n{"text": ""}\n{"text": "\\ud83d\\ude00 \\ud83d"}\n')
    assert load_documents(str(tmp_path / "a.jsonl")) == ["a", "\U0001f600 ?"]
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, "a", "", "b"]}), tmp_path / "a.parquet")
    assert load_documents(str(tmp_path / "a.parquet")) == ["a", "b"]


def test_the_text_may_have_another_field(tmp_path: Path) -> None:
    rows = {"text": [1] * 20, "story": DOCUMENTS}
    (tmp_path / "a.jsonl").write_text(LINES.replace('"text"', '"story"'))
    data = datasets.Dataset.from_dict(rows)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.jsonl", "a.parquet", "saved"):
        assert load_documents(str(tmp_path / name), "story") == DOCUMENTS


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": [*DOCUMENTS, None]})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(str(tmp_path / "splits"))
    assert load_documents(str(tmp_path / "one")) == DOCUMENTS == load_documents(str(tmp_path / "splits"))
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "no_train"))
    with pytest.raises(ValueError, match="no_train: has no split `train`, but test; give the folder of one of them"):
        load_documents(str(tmp_path / "no_train"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="one: cannot be read as a folder that datasets saved .*; save it again"):
        load_documents(str(tmp_path / "one"))


def test_a_long_corpus_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raysearch.training.corpus, "PROGRESS_S", -1.0)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 10**6}) + "\n")
    lines: list[str] = []
    load_texts(str(tmp_path / "a.jsonl"), say=lines.append)
    assert lines == [f"corpus {tmp_path / 'a.jsonl'}: 1 MB of text read"]


def test_bad_corpora_are_refused_in_one_sentence(tmp_path: Path) -> None:
    def refused(corpus: object, sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence) as error:
            load_documents(str(corpus))
        assert "\n" not in str(error.value)
        assert str(corpus) in str(error.value) or str(tmp_path) in str(error.value)

    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    def parquet(name: str, **columns: object) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / name)
        return tmp_path / name

    advice = "name the field that holds the text with --text-field, or text_field in STUDY"
    refused(tmp_path / "none.txt", "no such file or folder; give a path that exists")
    refused(file("a.pdf", b"x"), "must end in .txt, .json, .jsonl, .parquet .*, got a.pdf")
    refused(file("empty.txt", b" \n<|endoftext|>\n\n"), "holds no text")
    refused(file("latin.txt", b"a\nb\ncaf\xe9 au lait"), "latin.txt, line 3: must be UTF-8 text, .* byte 0xe9; convert")
    refused(file("latin.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "caf\xe9"}\n')), "line 2: must be UTF-8 text")
    refused(file("half.txt", "ab".encode("utf-16")[:-1]), "half.txt, line 1: must be UTF-8 text, or UTF-16")
    refused(file("torn.jsonl", b'{"text": "a"}\n{"text": "b'), "torn.jsonl, line 2: is not JSON .* at column 10")
    refused(file("torn.json", b'[{"text": "a"},\n{"text": "b'), "torn.json: is not JSON .* at line 2, column 10")
    refused(file("deep.jsonl", b"[" * 100_000), "deep.jsonl, line 1: is nested too deeply")
    refused(file("field.jsonl", b'{"txet": "a"}\n'), f"line 1: every row needs a field `text` .* the fields txet; {advice}")
    refused(file("list.jsonl", b'{"text": "a"}\n\n{"text": ["a"]}\n'), "list.jsonl, line 3: .*, got a list in it")
    refused(file("list.json", b'[{"text": "a"}, 3]'), "list.json, row 2: .*, got a int")
    refused(file("rows.jsonl", b'["a"]\n'), "got a list; name")
    refused(file("nulls.jsonl", b'{"text": null}\n'), "holds no text")
    refused(file("broken.parquet", b"PAR1 not really"), "cannot be read as Parquet")
    refused(parquet("column.parquet", story=["a"]), f"needs a column `text` of strings, got the columns story; {advice}")
    refused(parquet("lists.parquet", text=[["a"]]), "needs a column `text` of strings, got `text` of list<")
    refused(parquet("numbers.parquet", text=[1]), "got `text` of int64")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no file that ends in")
    datasets.Dataset.from_dict({"text": [["a"]]}).save_to_disk(str(tmp_path / "saved"))
    refused(tmp_path / "saved", r"needs a column `text` of strings, got `text` of List")


def test_a_dataset_that_cannot_be_had_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="neither a file or folder here nor a Hugging Face dataset") as error:
        load_documents("no-such-owner/no-such-dataset-of-raysearch:config")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("text")
    path.chmod(0)
    with pytest.raises(ValueError, match="cannot be read"):
        load_documents(str(path))
