"""What the table does not know of a model is refused before anything is scored, wherever a method may come from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from commands import Run
from families import CASES, HEADS, STRANGERS, UNITS, VOCAB, WIDE, WIDTH, random_model

from raysearch.config import Action, TrialConfig, study_of
from raysearch.trial.parts import check_parts

MORE_THAN_ADD = {
    "opt": lambda: hf.OPTConfig(**WIDE, ffn_dim=UNITS, word_embed_proj_dim=WIDTH, do_layer_norm_before=False),
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=HEADS,
                                    apply_residual_connection_post_layernorm=True),
    "falcon": lambda: hf.FalconConfig(**WIDE, apply_residual_connection_post_layernorm=True),
}
EVERYWHERE = {"pattern": "block"}, {"pattern": "2:4"}, {"criterion": "taylor"}
OF_KNOWN = {"pattern": "head"}, {"pattern": "neuron"}, {"pattern": "hybrid"}, {"criterion": "wanda"}, {"budget": "owl"}
OF_BLOCKS = {"pattern": "layer"}, {"layer_drop": 0.1}


def described(config: Any, folder: Path) -> str:
    """A folder in which nothing but the configuration can be read."""
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return str(folder)


def check(folder: str, *of_methods: dict[str, Any]) -> None:
    check_parts([Action(sparsity=0.5, **fields) for fields in ({}, *of_methods)], study_of(path=folder))


def test_a_known_family_has_all_parts(tmp_path: Path) -> None:
    for family, config in CASES.items():
        check(described(config(), tmp_path / family), *EVERYWHERE, *OF_KNOWN, *OF_BLOCKS)


@pytest.mark.parametrize("family", STRANGERS)
def test_an_unknown_family_has_what_needs_no_parts(family: str, tmp_path: Path) -> None:
    folder = described(STRANGERS[family](), tmp_path)
    check(folder, *EVERYWHERE)
    for fields in (*OF_KNOWN, *OF_BLOCKS):
        with pytest.raises(ValueError, match=f"^model {folder}: .*, and those of {family} are not.*; give .*architectures.py$"):
            check(folder, fields)


@pytest.mark.parametrize("family", MORE_THAN_ADD)
def test_blocks_that_do_more_than_add_have_all_parts_but_layers(family: str, tmp_path: Path) -> None:
    folder = described(MORE_THAN_ADD[family](), tmp_path)
    check(folder, *EVERYWHERE, *OF_KNOWN)
    setting = "do_layer_norm_before False" if family == "opt" else "apply_residual_connection_post_layernorm True"
    for fields in OF_BLOCKS:
        with pytest.raises(ValueError, match="blocks are known to do no more than add to what they get, and those of "
                                             f"{family} with {setting} are not"):
            check(folder, fields)


def test_a_matrix_between_embeddings_and_blocks_is_not_calibrated(tmp_path: Path) -> None:
    folder = described(hf.OPTConfig(**WIDE, ffn_dim=UNITS, word_embed_proj_dim=WIDTH // 2), tmp_path)
    check(folder, *EVERYWHERE, {"pattern": "head"}, {"pattern": "layer"})
    with pytest.raises(ValueError, match="calibration needs weights of linear layers inside the blocks, got model.*project_in"):
        check(folder, {"criterion": "wanda"})


def test_a_method_that_there_is_not_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = described(CASES["gpt2"](), tmp_path)
    with pytest.raises(ValueError, match="pattern must be one of"):
        check_parts([TrialConfig(target_sparsity=0.5, pattern="heads")], study_of(path=folder))


# ---- the commands ----

SPACE = """
STUDY = {"model": {"path": "model"}, "data": {"corpus": "stories.txt", "context_tokens": 32, "epoch_tokens": 1024},
         "training": {"batch_tokens": 256}, "evaluation": {"tasks": ("text",), "num_items": 2}, "search": {"num_trials": 4}}


def space(trial):
    rarely = trial.suggest_int("x", 1, 40) == 40
    return {"target_sparsity": 0.5, "pattern": %s if rarely else "unstructured"}
"""
RULE = """

def round(trial, parent):
    return {"sparsity": 0.5, "pattern": %r}
"""


@pytest.mark.parametrize(("config", "pattern", "sentence"), [
    (STRANGERS["codegen"], "head", "pattern head needs a model whose heads are known, and those of codegen are not"),
    (STRANGERS["mixtral"], "neuron", "pattern neuron needs a model whose neurons are known, and those of mixtral are not"),
    (MORE_THAN_ADD["opt"], "layer", "and those of opt with do_layer_norm_before False are not; give another pattern"),
], ids=["codegen", "mixtral", "opt 350m"])
def test_every_command_refuses_it_and_writes_nothing(run: Run, tiny_model: Path, stories: Path, tmp_path: Path, config: Any,
                                                     pattern: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    random_model(config()).save_pretrained(tmp_path / "model")
    for file in (*tiny_model.glob("tokenizer*"), stories):
        shutil.copy(file, tmp_path / "model" if file != stories else tmp_path)
    plain, rare = (SPACE % each for each in ("'unstructured'", repr(pattern)))
    name = f"of_{pattern}"  # a module is imported once
    for suffix, text in (("plain", plain), ("rare", rare), ("rule", plain + RULE % pattern)):
        (tmp_path / f"{name}_{suffix}.py").write_text(text)
    (tmp_path / "trials").write_text(json.dumps({"target_sparsity": 0.5, "pattern": pattern}))
    (tmp_path / "actions").write_text(json.dumps([{"sparsity": 0.5}, {"sparsity": 0.5, "pattern": pattern}]))
    before = {*tmp_path.iterdir(), tmp_path / "cache"}
    for command in (("prune", "model", "--sparsity", 0.5, "--pattern", pattern, "--corpus", "stories.txt", "--tasks", "text"),
                    ("prune", "model", "--actions", "actions"), ("sweep", f"{name}_rare"), ("sweep", f"{name}_rule"),
                    ("sweep", f"{name}_plain", "--trials-from", "trials"), ("sweep", f"{name}_plain", "--enqueue", "trials"),
                    ("plan", f"{name}_rare"), ("plan", f"{name}_rule")):
        code, _, err = run(*command, "--out", "out")
        assert (code, err.count("\n")) == (2, 1), (command, err)
        assert sentence in err, command
    for suffix in ("rare", "rule"):
        code, _, err = run("space", f"{name}_{suffix}")
        assert (code, err.count("\n")) == (2, 1), err
        assert sentence in err
    assert {*tmp_path.iterdir()} <= {*before, tmp_path / "__pycache__"}
