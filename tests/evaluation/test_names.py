"""Names that are mistyped; tests/test_cli.py holds that nothing heavy is imported for them."""

from pathlib import Path

import pytest

from raysearch.evaluation.names import check_names


def test_what_is_there_is_accepted(tiny_model: Path) -> None:
    check_names(str(tiny_model), ("text", "hellaswag", "arc_easy"))
    check_names(str(tiny_model), ())


@pytest.mark.parametrize(("wrong", "sentence"), [
    ({"model": "/none"}, "model /none: no such folder"), ({"tasks": ["last_wrd"]}, "'last_wrd' is not known; .* last_word")])
def test_what_is_not_there_is_named(wrong: dict, sentence: str, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_names(**{"model": str(tiny_model), "tasks": (), **wrong})
