"""Names that are mistyped; tests/test_cli.py holds that nothing heavy is imported for them."""

from pathlib import Path

import pytest

from raysearch.evaluation.names import check_names


def test_what_is_there_is_accepted(tiny_model: Path) -> None:
    check_names(str(tiny_model), ("text", "hellaswag", "arc_easy"), "builtin", "text")
    check_names(str(tiny_model), (), None, "text")
    check_names(str(tiny_model), (), "owner/name:config", "text")  # only the hub knows


@pytest.mark.parametrize(("wrong", "sentence"), [
    ({"model": "/none"}, "model /none: no such folder"), ({"tasks": ["last_wrd"]}, "'last_wrd' is not known; .* last_word"),
    ({"corpus": "books.txt"}, "corpus 'books.txt': no such file"), ({"corpus": "my books"}, "no such file or folder"),
    ({"corpus": "{folder}"}, "no file that ends in"), ({"corpus": "{folder}/*.jsonl"}, "no file that ends in"),
    ({"corpus": "{file}", "field": "story"}, "line 1: every row needs a field `story` .*, got the fields text")])
def test_what_is_not_there_is_named(wrong: dict, sentence: str, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    if "corpus" in wrong:
        wrong["corpus"] = wrong["corpus"].format(folder=tmp_path / "empty", file=tmp_path / "a.json")
    with pytest.raises(ValueError, match=sentence):
        check_names(**{"model": str(tiny_model), "tasks": (), "corpus": None, "field": "text", **wrong})
