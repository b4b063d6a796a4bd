"""What a study reads: which settings make another study, and what does not fit together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysearch.config import SECTION_OF, Study, study_of
from raysearch.trial.inputs import check_objectives, read_inputs, resolve

ELSEWHERE: dict[str, Any] = {
    "objectives": ("stored_bytes", "last_word/acc"), "sampler_seed": 5, "dense_control": False, "num_trials": 99,
    "max_concurrent": 7, "time_budget_s": 60.0,
    "round_limit_s": 5.0, "zero_stage": 3, "num_ranks": 2, "gpus_per_rank": 1.0, "cpus_per_rank": 2.0}
"""Another value of every setting that changes no number of a candidate."""


def test_what_says_how_or_where_is_in_no_key(study: Study) -> None:
    key = read_inputs(study).root_key
    for name, value in ELSEWHERE.items():
        assert getattr(getattr(study, SECTION_OF[name]), name) != value
        assert read_inputs(study.replaced(**{name: value})).root_key == key, name


@pytest.mark.parametrize("change", [{"seed": 1}, {"weight_decay": 0.1}, {"num_items": 5}, {"num_report_items": 5},
                                    {"batch_tokens": 512}, {"tasks": ("text",)}, {"dtype": "bfloat16"}, {"prunable": "all"},
                                    {"racing_level": 0.05}])
def test_what_can_change_a_number_is_in_the_key(study: Study, change: dict[str, Any]) -> None:
    assert read_inputs(study.replaced(**change)).root_key != read_inputs(study).root_key


def test_a_model_and_a_corpus_count_by_their_contents(study: Study, tiny_model: Path, stories: Path, tmp_path: Path) -> None:
    key = read_inputs(study).root_key
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for folder in ("same", "other"):
        for file in tiny_model.iterdir():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    model.transformer.ln_f.bias.data[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "stories.txt").write_text(stories.read_text())
    (tmp_path / "more.txt").write_text(stories.read_text() + "\n<|endoftext|>\nOnce more.")

    def key_with(**paths: Path) -> str:
        return read_inputs(study.replaced(**{name: str(path) for name, path in paths.items()})).root_key

    assert key_with(path=tmp_path / "same", corpus=tmp_path / "stories.txt") == key
    assert key_with(path=tmp_path / "other") != key
    assert key_with(corpus=tmp_path / "more.txt") != key


def test_splits_have_items_of_their_own(study: Study) -> None:
    inputs = read_inputs(study)
    assert inputs.blocks is not None
    assert inputs.num_train_tokens == inputs.blocks.num_tokens > 0
    texts = {split: [item["item_id"] for task in tasks for item in task.eval_docs] for split, tasks in inputs.tasks.items()}
    assert all(1 <= len(ids) <= 2 * 6 for ids in texts.values())  # eval_items of each of two tasks, where there are so many
    assert not set(texts["selection"]) & set(texts["report"])
    other = read_inputs(study.replaced(num_report_items=1)).tasks
    assert sum(len(task.eval_docs) for task in inputs.tasks["report"]) > 2
    assert [len(task.eval_docs) for task in other["report"]] == [1, 1]
    assert [list(task.eval_docs) for task in other["selection"]] == [list(task.eval_docs) for task in inputs.tasks["selection"]]


def test_a_study_without_a_corpus_trains_on_nothing(study: Study) -> None:
    bare = read_inputs(study.replaced(**{"corpus": None, "tasks": ()}))
    assert (bare.num_train_tokens, bare.blocks, dict(bare.tasks)) == (0, None, {"selection": [], "report": []})


def test_auto_is_the_checkpoints_own_dtype(study: Study, tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    half = resolve(study_of(path=str(tmp_path / "half")))
    assert (half.model.path, half.model.dtype) == (str(tmp_path / "half"), "bfloat16")
    assert study.model.dtype == "float32"
    assert resolve(study_of(path=str(tmp_path / "half"), dtype="float32")).model.dtype == "float32"


@pytest.mark.parametrize(("change", "sentence"), [
    ({"context_tokens": 128}, "context_tokens must be at most the model's 64, got 128"),
    ({"corpus": None}, "tasks text, last_word are made from the corpus's held-out documents, but corpus is None"),
])
def test_what_does_not_fit_together_is_refused(study: Study, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_inputs(study.replaced(**change))


def test_objectives_and_constraints_must_be_measured(study: Study) -> None:
    inputs = read_inputs(study)
    check_objectives(study.replaced(constraints={"stored_bytes": 1e6, "last_word/acc": 0.1}, max_drop={"last_word/acc": 1}),
                     inputs)
    for setting, value in {"objectives": ("num_nonzero", "choice/acc"), "constraints": {"choice/acc": 0.5},
                           "max_drop": {"choice/acc": 1.0}}.items():
        with pytest.raises(ValueError, match=rf"{setting} must be of sizes .num_nonz.* and metrics .*last_word/.*, got 'cho"):
            check_objectives(study.replaced(**{setting: value}), inputs)
    asked = study.replaced(constraints={"predicted_ms": 5.0})
    with pytest.raises(ValueError, match=r"prompt_tokens and new_tokens, which must be at most 64 together, .* got 128"):
        check_objectives(asked, inputs)
    check_objectives(asked.replaced(prompt_tokens=32), inputs)
