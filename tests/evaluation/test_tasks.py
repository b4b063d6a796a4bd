"""Items, prompts and splits of the tasks; what is wrong with a file is said exactly."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import story

from raysearch.evaluation import describe_tasks, heldout_tasks, load_tasks, tasks_fingerprint
from raysearch.evaluation.tasks import FILE_TASKS, STORY_COLUMNS, _keep, in_split

DOCUMENTS = [story(7 * n) for n in range(12)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    question = [{"question": f"who lives in house {n}", "answer": [f"the dog {n}", f"dog {n}"]} for n in range(30)]
    rows: dict[str, list[dict[str, Any]]] = {
        "lambada/test.jsonl": [{"text": f"The dog of house {n} ran to the river and then home to house {n}."[:-1]}
                               for n in range(30)],
        "hellaswag/validation.jsonl": [{"ctx": f"House {n} is", "endings": ["red.", "old.", "a dog.", "wet."],
                                        "label": n % 4, "activity_label": "Houses"} for n in range(30)],
        "nq_open/validation.jsonl": question, "webquestions/test.jsonl": question,
        "triviaqa/validation.jsonl": question,
    }
    for name, lines in rows.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "storycloze").mkdir()
    (folder / "storycloze/test.csv").write_text("\ufeffInputStoryid," + ",".join(STORY_COLUMNS) + "\n" + "".join(
        f'{n},"Ann, aged {n}, had a dog.",It ran.,She ran.,They slept.,They woke up.,The dog was a car.,{1 + n % 2}\n'
        for n in range(30)))
    return folder


def prompts(task: Any, num_fewshot: int = 0) -> list[str]:
    task.set_fewshot_seed(seed=1234)
    return [task.fewshot_context(doc, num_fewshot=num_fewshot) for doc in task.eval_docs]


def test_prompts_are_pinned(data_dir: Path) -> None:
    tasks = {task.config.task: task for task in load_tasks(list(FILE_TASKS), data_dir=data_dir)}
    first = {name: (prompts(task)[0], task.doc_to_target(task.eval_docs[0])) for name, task in tasks.items()}
    answers = ["the dog 0", "dog 0"]
    assert first == {
        "lambada": ("The dog of house 0 ran to the river and then home to house", " 0"),
        "storycloze": ("Ann, aged 0, had a dog. It ran. She ran. They slept.", 0),
        "hellaswag": ("House 0 is", 0),
        "nq_open": ("Answer these questions:\n\nQ: who lives in house 0?\nA:", answers),
        "webqs": ("Q: who lives in house 0\nA:", answers),
        "triviaqa": ("Question: who lives in house 0?\nAnswer:", answers),
    }
    request = tasks["hellaswag"].construct_requests(tasks["hellaswag"].eval_docs[0], "House 0 is",
                                                    metadata=("hellaswag", 0, 1))
    assert [r.args for r in request] == [("House 0 is", f" {ending}") for ending in ("red.", "old.", "a dog.", "wet.")]


def test_shots_never_hold_the_item_and_do_not_depend_on_limit_or_split(data_dir: Path) -> None:
    task, = load_tasks(["triviaqa"], data_dir=data_dir)
    for doc, prompt in zip(task.eval_docs, prompts(task, 3)):
        assert prompt.count("Answer: the dog") == 3
        assert prompt.endswith(f"\n\nQuestion: {doc['question']}?\nAnswer:")
        assert prompt.count(f"Question: {doc['question']}?") == 1
    short, = load_tasks(["triviaqa"], data_dir=data_dir, limit=5)
    assert prompts(short, 3) == prompts(task, 3)[:5]
    report, = load_tasks(["triviaqa"], data_dir=data_dir, split="report")
    shots = {part for prompt in prompts(report, 3) for part in prompt.split("\n\n")[:3]}
    assert not shots & {f"Question: {doc['question']}?\nAnswer: {doc['answer'][0]}" for doc in report.eval_docs}


@pytest.mark.parametrize("name", FILE_TASKS)
def test_selection_and_report_are_disjoint_halves(data_dir: Path, name: str) -> None:
    ids = {split: [doc["item_id"] for doc in load_tasks([name], data_dir=data_dir, split=split)[0].eval_docs]
           for split in ("selection", "report", "all")}
    assert sorted(ids["selection"] + ids["report"]) == sorted(ids["all"])
    assert len(set(ids["all"])) == 30
    assert min(len(ids["selection"]), len(ids["report"])) >= 6


def test_equal_items_have_equal_fingerprints(data_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data_dir, tmp_path / "data")
    tasks = load_tasks(["lambada", "hellaswag"], data_dir=data_dir)
    assert tasks_fingerprint(load_tasks(["lambada", "hellaswag"], data_dir=copy)) == tasks_fingerprint(tasks)
    path = copy / "lambada/test.jsonl"
    path.write_text(path.read_text().replace("house 7", "house 8"))
    assert tasks_fingerprint(load_tasks(["lambada", "hellaswag"], data_dir=copy)) != tasks_fingerprint(tasks)
    assert tasks_fingerprint(tasks[:1]) != tasks_fingerprint(tasks)


def test_a_task_of_the_hub_keeps_the_first_items_of_a_split(data_dir: Path) -> None:
    kept = {}
    for split, limit in (("selection", None), ("report", None), ("selection", 3)):
        (task,) = load_tasks(["lambada"], data_dir=data_dir)  # the same class as the hub's
        _keep(task, split, limit)
        kept[split, limit] = [doc["item_id"] for doc in task.eval_docs]
    assert kept["selection", 3] == kept["selection", None][:3]
    assert len(set(kept["selection", None]) | set(kept["report", None])) == 30
    assert not set(kept["selection", None]) & set(kept["report", None])


def test_split_does_not_depend_on_the_order_of_lines(data_dir: Path, tmp_path: Path) -> None:
    lines = (data_dir / "lambada/test.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (tmp_path / "lambada").mkdir()
    (tmp_path / "lambada/test.jsonl").write_text("".join(lines))
    first, second = (load_tasks(["lambada"], data_dir=folder, split="report")[0] for folder in (data_dir, tmp_path))
    assert {doc["item_id"] for doc in first.eval_docs} == {doc["item_id"] for doc in second.eval_docs}
    assert np.mean([in_split(str(n), "report") for n in range(2000)]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("name", "line", "message"), [
    ("lambada", '{"text": 3}', r"lambada/test.jsonl, line 2: field 'text' must be a text of two words or more, .*, got 3"),
    ("lambada", '{"text": "word"}', "line 2: field 'text' must be a text of two words or more, .*, got 'word'"),
    ("lambada", '{"text": "a word "}', "line 2: field 'text' must be a text of two words or more"),
    ("lambada", '{"txt": "a b"}', "line 2: field 'text' is missing; the fields are txt"),
    ("lambada", '{"text": ', "line 2: is not JSON .Expecting value at column 9"),
    ("lambada", '["a b"]', "line 2: must be a JSON object"),
    ("hellaswag", '{"ctx": "a", "endings": ["b", "c"], "label": 2}', "'label' must be below the number of endings, 2"),
    ("hellaswag", '{"ctx": "a", "endings": "b", "label": 0}', "'endings' must be a list of two texts or more, .*, got 'b'"),
    ("hellaswag", '{"ctx": "a", "endings": ["", "b"], "label": 1}', "must be a list of two texts or more, none of them blank"),
    ("hellaswag", '{"ctx": "a", "endings": ["b", "c"], "label": -1}', "'label' must be the number of the right .* on, got -1"),
    ("hellaswag", '{"ctx": "a", "endings": ["b", "c"], "label": true}', "field 'label' must be the number .*, got True"),
    ("triviaqa", '{"question": "a", "answer": []}', r"field 'answer' must be a list of texts, got \[\]"),
    ("triviaqa", '{"question": "\xa0", "answer": ["a"]}', r"field 'question' must be a text that is not blank"),
])
def test_a_malformed_line_names_file_line_and_field(data_dir: Path, tmp_path: Path, name: str, line: str,
                                                    message: str) -> None:
    file = FILE_TASKS[name].files[0]
    good = (data_dir / file).read_text().splitlines()
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text("\n".join([good[0], line, *good[1:]]))
    with pytest.raises(ValueError, match=message):
        load_tasks([name], data_dir=tmp_path)


def test_unknown_names_missing_files_and_limits(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task 'triviaqa' needs .*validation\.jsonl, which does not exist"):
        load_tasks(["triviaqa"], data_dir=tmp_path)
    with pytest.raises(ValueError, match="limit must be at least 1 item; got 0"):
        load_tasks(["triviaqa"], data_dir=data_dir, limit=0)
    with pytest.raises(ValueError, match="task 'text' is made from held-out documents"):
        load_tasks(["text"], data_dir=data_dir)
    with pytest.raises(ValueError, match="task 'last_wrd' is not known; the nearest names are last_word"):
        heldout_tasks(DOCUMENTS, ["last_wrd"])
    with pytest.raises(ValueError, match="task 'choice' finds no item in the held-out documents, .* which can serve text$"):
        heldout_tasks(["Too short."], ["choice"])
    with pytest.raises(ValueError, match="task 'last_word' finds no item .* which can serve text and choice$"):
        heldout_tasks([" ".join(f"def f{n} ( x ) : return x + {n} ;" for n in range(99))], ["last_word"])


def test_files_in_another_encoding_or_with_labels_as_text_are_read(data_dir: Path, tmp_path: Path) -> None:
    file = FILE_TASKS["hellaswag"].files[0]
    text = (data_dir / file).read_text()
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(text.replace('"label": 3', '"label": "3"'), encoding="utf-16")
    same = [tasks_fingerprint(load_tasks(["hellaswag"], data_dir=folder)) for folder in (data_dir, tmp_path)]
    assert same[0] == same[1]
    (tmp_path / file).write_bytes(text.encode() + b'{"ctx": "caf\xe9"}')
    with pytest.raises(ValueError, match="validation.jsonl, line 31: must be UTF-8 text"):
        load_tasks(["hellaswag"], data_dir=tmp_path)
    story_file = tmp_path / FILE_TASKS["storycloze"].files[0]
    story_file.parent.mkdir()
    story_file.write_text("InputSentence1,InputSentence2\n" + "x" * 200_000)
    with pytest.raises(ValueError, match="test.csv: cannot be read .field larger than field limit"):
        load_tasks(["storycloze"], data_dir=tmp_path)


@pytest.mark.parametrize("name", FILE_TASKS)
def test_without_files_and_offline_one_clear_sentence(name: str, monkeypatch: pytest.MonkeyPatch,
                                                      tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match=rf"task '{name}': its data set is not on this machine .* DIR/{name[:3]}"):
        load_tasks([name])


@pytest.mark.slow
def test_unknown_lm_eval_task_lists_the_nearest(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="task 'helaswag' is not known; the nearest names are hellaswag"):
        load_tasks(["helaswag"], data_dir=data_dir)


def test_describe_tasks_shows_what_is_pinned() -> None:
    rows = {row["task"]: row for row in describe_tasks()}
    assert set(rows) == {*FILE_TASKS, "text", "last_word", "choice"}
    assert rows["nq_open"]["prompt"] == '"Answer these questions:\\n\\nQ: {{question}}?\\nA:"'
    assert "ignore articles" in rows["nq_open"]["normalisation"]
    assert "ignore articles" not in rows["triviaqa"]["normalisation"]
    assert rows["hellaswag"]["metrics"] == "acc, acc_norm"
