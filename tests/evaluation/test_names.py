"""Names that are mistyped; tests/test_cli.py holds that nothing heavy is imported for them."""

from pathlib import Path

import pytest

from raysearch.config import Study, study_of
from raysearch.evaluation import heldout_tasks, load_tasks, metric_names
from raysearch.evaluation.names import check_measured, check_names, known_metrics
from raysearch.evaluation.tasks import HELDOUT_CONFIGS


def test_what_is_there_is_accepted(tiny_model: Path) -> None:
    check_names(str(tiny_model), ("text", "hellaswag", "arc_easy"), "builtin", "text")
    check_names(str(tiny_model), (), None, "text")
    check_names(str(tiny_model), (), "owner/name:config", "text")  # only the hub knows


@pytest.mark.parametrize(("wrong", "sentence"), [
    ({"model": "/none"}, "model /none: no such folder"), ({"tasks": ["last_wrd"]}, "'last_wrd' is not known; .* last_word"),
    ({"corpus": "books.txt"}, "corpus 'books.txt': no such file"), ({"corpus": "my books"}, "no such file or folder"),
    ({"corpus": "raysearch/trainnig"}, "no such file or folder"),
    ({"corpus": "{folder}"}, "no file that ends in"), ({"corpus": "{folder}/*.jsonl"}, "no file that ends in"),
    ({"corpus": "{file}", "field": "story"}, "line 1: every row needs a field `story` .*, got the fields text")])
def test_what_is_not_there_is_named(wrong: dict, sentence: str, tiny_model: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    if "corpus" in wrong:
        wrong["corpus"] = wrong["corpus"].format(folder=tmp_path / "empty", file=tmp_path / "a.json")
    with pytest.raises(ValueError, match=sentence):
        check_names(**{"model": str(tiny_model), "tasks": (), "corpus": None, "field": "text", **wrong})


def study(tasks: tuple[str, ...], **search: object) -> Study:
    return study_of(path="m", tasks=tasks, data_dir="data", **search)


@pytest.mark.parametrize(("tasks", "search", "sentence"), [
    (("text",), {"constraints": {"lambada/acc": 0.5}}, r"constraints must be .*byte_per.*text/token_per.*'lambada/acc'"),
    (("text",), {"objectives": ("num_nonzero", "last_word/acc")}, "objectives must .* got 'last_word/acc'"),
    (("text", "hellaswag"), {"max_drop": {"hellaswag/exact_match": 1.0}}, r"max_drop .* hellaswag/acc, .* 'hellaswag/exact_m"),
    (("arc_easy",), {"objectives": ("num_nonzero", "text/bits_per_byte")}, None),  # a file of it may call its task so
    (("text", "arc_easy"), {"max_drop": {"text/acc": 1.0}}, "got 'text/acc'"),
    (("last_wrd",), {"objectives": ("num_nonzero", "last_wrd/acc")}, "'last_wrd' is not known; .* last_word")])
def test_what_nobody_measures_is_named_before_a_task_is_loaded(tasks: tuple[str, ...], search: dict, sentence: str | None
                                                               ) -> None:
    if sentence is None:
        check_measured(study(tasks, **search))
        return
    with pytest.raises(ValueError, match=sentence):
        check_measured(study(tasks, **search))


def test_what_only_lm_eval_knows_is_believed_until_its_tasks_are_loaded() -> None:
    asked = study(("text", "arc_easy", "./mine.yaml"), constraints={"arc_easy/acc_norm": 0.5, "mine/f1": 0.5})
    check_measured(asked)
    with pytest.raises(ValueError, match="got 'mine/f1'"):
        check_measured(asked, ["text/bits_per_byte", "arc_easy/acc_norm"])


def test_metrics_that_are_known_are_those_of_the_loaded_tasks(tmp_path: Path) -> None:
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag" / "validation.jsonl").write_text('{"ctx": "a", "endings": ["b", "c"], "label": 1}\n')
    words = "A man and his dog went home. They saw the man again near the home of his dog that day. " * 40
    documents = [words.replace("dog", animal).replace("home", place) for animal, place in
                 (("cat", "town"), ("cow", "field"), ("bird", "tree"), ("fish", "lake"), ("fox", "wood"))]
    tasks = heldout_tasks(documents, list(HELDOUT_CONFIGS)) + load_tasks(["hellaswag"], data_dir=tmp_path)
    known = [each for name in (*HELDOUT_CONFIGS, "hellaswag") for each in known_metrics(name, True) or ()]
    assert metric_names(tasks) == known
    assert known_metrics("hellaswag", False) is known_metrics("arc_easy", True) is None
