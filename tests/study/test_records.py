"""Keys that name rounds, and what they are made of."""

from typing import Any

import pytest

from raysearch.config import SECTION_OF, Action, Metric, Study, study_of
from raysearch.study.records import (
    FORMAT,
    Provenance,
    RoundRecord,
    canonical,
    objective_values,
    root_key,
    round_key,
    settings_that_decide_numbers,
)

STUDIES: dict[str, dict[str, Any]] = {
    "aadf4bec": {}, "c7202d77": {"dtype": "bfloat16"}, "fd699f71": {"prunable": "all"}, "1fa63ae2": {"context_tokens": 64},
    "fa78d942": {"epoch_tokens": 4096}, "22e04736": {"seed": 1}, "c04d5ebd": {"batch_tokens": 2048},
    "1fb76197": {"weight_decay": 0.1},
    "29238ec5": {"tasks": ("text", "lambada")}, "8a845124": {"num_items": 60, "racing_level": 0.05},
}
ACTIONS: dict[str, Action] = {
    "b9ef8176": Action(sparsity=0.5), "5cdb8722": Action(sparsity=0.0), "ac072420": Action(sparsity=0.5, scope="layer"),
    "725a7495": Action(threshold=0.02), "745fdf02": Action(threshold=0.7, threshold_unit="std"),
    "696d13e1": Action(sparsity=0.5, pattern="head"),
    "64f562a6": Action(sparsity=0.5, criterion="movement", mask_interval_steps=10),
    "93e9b5d1": Action(sparsity=0.5, finetune_tokens=8192, learning_rate=1e-3),
    "65a55363": Action(sparsity=0.5, finetune_tokens=8192, data_start_tokens=8192, learning_rate=1e-3, l1_lambda=1e-4),
    "cdd258bf": Action(sparsity=0.5, finetune_tokens=8192, learning_rate=1e-3, seed=3),
}
CONTENTS = ["model", "blocks", "selection", "report"]


def test_twenty_keys_are_what_they_were() -> None:
    """One that changes names other numbers: FORMAT must rise, and old studies are refused."""
    keys = [*(root_key(study_of(path="m", **settings), CONTENTS)[:8] for settings in STUDIES.values()),
            *(round_key("root", action)[:8] for action in ACTIONS.values())]
    assert FORMAT == 3
    assert keys == [*STUDIES, *ACTIONS]
    assert len(set(keys)) == 20


def test_keys_follow_parent_and_action() -> None:
    action = Action(sparsity=0.5)
    assert round_key("a", action) == round_key("a", Action(sparsity=0.5, l1_lambda=0.0))
    assert len({round_key("a", action), round_key("b", action), round_key("a", Action(sparsity=0.51))}) == 3


def test_only_what_differs_from_its_default_is_hashed() -> None:
    assert canonical(Action(sparsity=0.5)) == {"sparsity": 0.5}
    assert settings_that_decide_numbers(study_of(path="m")) == {
        "model": {}, "data": {}, "training": {}, "evaluation": {}}


@pytest.mark.parametrize(("setting", "value"), [("path", "elsewhere"), ("corpus", "elsewhere"), ("data_dir", "elsewhere"),
                                                ("num_ranks", 2), ("zero_stage", 3), ("num_trials", 99), ("sampler_seed", 3)])
def test_where_things_lie_and_how_fast_is_in_no_key(setting: str, value: object) -> None:
    assert root_key(study_of(path="m").replaced(**{setting: value}), CONTENTS) == root_key(study_of(path="m"), CONTENTS)


def test_contents_are_in_the_key() -> None:
    assert root_key(study_of(path="m"), CONTENTS) != root_key(study_of(path="m"), [*CONTENTS[:3], "another"])


def test_settings_have_names_of_their_own_over_all_sections() -> None:
    assert len(SECTION_OF) == sum(len(field.annotation.model_fields) for field in Study.model_fields.values())


def test_objective_values_are_sizes_and_metrics() -> None:
    provenance = Provenance(created_at="", git_commit=None, versions={}, device="", hostname="")
    record = RoundRecord(
        key="k", parent=None, action=None, depth=0, num_parameters=9, num_prunable=5, num_nonzero=7, sparsity=0.0,
        model_sparsity=0.0, layer_sparsity={}, stored_bytes=28, resident_bytes=36, train_loss=None, prune_s=0.0, finetune_s=0.0,
        evaluate_s=0.0, weights_sha256=None, provenance=provenance,
        metrics={"lambada/acc": Metric(value=0.25, stderr=None, num_items=4)})
    assert objective_values(record, ("lambada/acc", "stored_bytes", "num_nonzero")) == (0.25, 28.0, 7.0)
    assert objective_values(record, ("num_nonzero", "text/bits_per_byte")) is None
