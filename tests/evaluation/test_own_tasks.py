"""A user's own tasks, by a path."""

import json
from pathlib import Path

import pytest
from commands import Run

from raysearch.evaluation import load_tasks, tasks_fingerprint

CAPITALS = """task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: capitals.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "capitals.yaml").write_text(CAPITALS)
    (tmp_path / "mine" / "other.yaml").write_text(CAPITALS.replace("task: capitals", "task: other"))
    (tmp_path / "mine" / "capitals.jsonl").write_text("".join(
        json.dumps({"country": f"Country {n}", "choices": [" red", " old"], "label": n % 2}) + "\n" for n in range(20)))
    return tmp_path / "mine"


def test_a_file_or_a_folder_of_tasks(folder: Path) -> None:
    (task,) = load_tasks([str(folder / "capitals.yaml")])
    assert (task.config.task, len(task.eval_docs)) == ("capitals", 20)
    assert task.doc_to_text(task.eval_docs[3]) == "The capital of Country 3 is"
    assert {task.config.task for task in load_tasks([str(folder)])} == {"capitals", "other"}
    halves = [load_tasks([str(folder / "capitals.yaml")], split=split)[0].eval_docs for split in ("selection", "report")]
    assert sorted(row["country"] for half in halves for row in half) == sorted(f"Country {n}" for n in range(20))


def test_another_prompt_is_another_task(folder: Path) -> None:
    name = str(folder / "capitals.yaml")
    before = tasks_fingerprint(load_tasks([name]))
    assert before == tasks_fingerprint(load_tasks([name]))
    (folder / "capitals.yaml").write_text(CAPITALS.replace("The capital", "The main city"))
    assert before != tasks_fingerprint(load_tasks([name]))


def test_a_study_takes_them(folder: Path, run: Run, tiny_model: Path) -> None:
    code, out, err = run("evaluate", tiny_model, "--tasks", folder / "capitals.yaml", "--limit", 8)
    assert code == 0, err
    assert out.splitlines()[1].split()[:2] == ["capitals", "acc"]
    code, _, err = run("prune", tiny_model, "--sparsity", 0.5, "--tasks", "mine/capitals.yaml", "--out", "out")
    assert code == 0, err
    assert "capitals/acc" in run("results", "out")[1]
    assert run("verify", "out/model")[0] == 0


@pytest.mark.parametrize(("content", "sentence"), [
    (None, "no such file or folder of YAML tasks in lm-eval's form"), ("a: [", "holds no task in lm-eval's form"),
    ("x: 1", "holds no task in lm-eval's form"),
    (CAPITALS.replace("capitals.jsonl", "nowhere.jsonl"), "lm-eval cannot load it ("),
])
def test_what_is_none_is_one_sentence(folder: Path, run: Run, tiny_model: Path, content: str | None, sentence: str) -> None:
    (folder / "other.yaml").unlink()
    if content is None:
        (folder / "capitals.yaml").unlink()
    else:
        (folder / "capitals.yaml").write_text(content)
    code, _, err = run("evaluate", tiny_model, "--tasks", "mine/capitals.yaml")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"task 'mine/capitals.yaml': {sentence}" in err
