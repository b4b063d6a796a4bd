"""Weights that do not fit, and files that are none: one sentence, never a random weight."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import KNOWN, random_model
from safetensors.torch import load_file, save_file

from raysearch.models.checkpoint import Base, weight_files
from raysearch.models.model import check_model, dtype_note, fingerprint, load_model, stored_dtype

Weights = dict[str, torch.Tensor]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(24).view(2, 12)).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model(KNOWN["gpt2"]()).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def within_blocks(wrapper: str) -> Callable[[str], str]:
    return lambda name: re.sub(r"(\.\d+\.)", rf"\1{wrapper}.", name)


@pytest.mark.parametrize("rename", [
    lambda name: f"_orig_mod.{name}", lambda name: f"module.{name}", lambda name: f"model.{name}",
    lambda name: f"module._orig_mod.{name}", lambda name: f"net.student.llm.{name}", within_blocks("_orig_mod"),
    lambda name: "_fsdp_wrapped_module." + within_blocks("_fsdp_wrapped_module._checkpoint_wrapped_module")(name),
], ids=["compiled", "ddp", "lightning", "both", "own class", "compiled blocks", "fsdp"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_names_that_wrappers_left_are_mended(family: str, rename: Callable[[str], str], tmp_path: Path) -> None:
    """Llama's own names begin with `model.` too, and its head lies beside it."""
    model = random_model(KNOWN[family]())
    model.save_pretrained(tmp_path)
    before = set(load_file(tmp_path / "model.safetensors"))
    rewrite(tmp_path, lambda weights: {rename(name): weight for name, weight in weights.items()})
    mended = load_model(str(tmp_path))
    assert torch.equal(logits(mended), logits(model))
    mended.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == before


KEY = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda w: {name: x for name, x in w.items() if ".h.1." not in name},
     r"12 missing \(transformer.h.1.attn.c_attn.bias, .*, \.\.\.\); give the config.json"),
    (lambda w: {**w, "score.weight": torch.ones(2, 2)}, r"1 left over \(score.weight\)"),
    (lambda w: {**w, KEY: w[KEY][:, :-1].clone()}, r"1 of another shape \(.*mlp.c_fc.weight \[32, 127\] instead of"),
    (lambda w: {"a": torch.ones(2)}, r"missing .*, and 1 left over \(a\)"),
    (lambda w: {**w, KEY: w[KEY] / 0}, r"transformer.h.1.mlp.c_fc.weight holds 4096 of 4096 values that are NaN or infinite"),
    (lambda w: {**w, KEY: w[KEY].index_fill(0, torch.tensor(3), torch.nan)}, "holds 128 of 4096 values that are NaN"),
    (lambda w: {name: x.double() * (1e200 if name == KEY else 1) for name, x in w.items()}, "c_fc.weight holds 4096 of 4096"),
    (lambda w: {name: x.to(torch.int8) for name, x in w.items()}, r"28 of whole numbers, as of a quantised model \(trans"),
    (lambda w: {f"module.{name}": x / 0 for name, x in w.items()}, "holds .* that are NaN or infinite"),
], ids=["a layer", "a head", "a shape", "another model", "infinite", "NaN", "too large for fp32", "int8", "infinite, wrapped"])
@pytest.mark.parametrize("read", [load_model, lambda path: check_model(path, torch.float32)], ids=["loaded", "checked"])
def test_weights_that_do_not_fit_are_named(folder: Path, change: Callable[[Weights], Weights], sentence: str,
                                           read: Callable[[str], object]) -> None:
    rewrite(folder, change)
    with pytest.raises(ValueError, match=sentence):
        read(str(folder))


def test_a_check_loads_nothing(folder: Path) -> None:
    """A driver checks a model that only its ranks have memory for."""
    assert all(parameter.is_meta for parameter in load_model(str(folder), device="meta").parameters())
    rewrite(folder, lambda weights: {f"_orig_mod.{name}": weight for name, weight in weights.items()})
    assert all(parameter.is_meta for parameter in load_model(str(folder), device="meta").parameters())
    check_model(str(folder), torch.float32)


def test_what_transformers_computes_itself_is_not_missed(folder: Path) -> None:
    """A tied head, and the masks and tables that older versions stored."""
    whole = logits(load_model(str(folder)))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    rewrite(folder, lambda w: {**w, "transformer.h.0.attn.masked_bias": torch.ones(1), "x.rotary_emb.inv_freq": torch.ones(3)})
    assert torch.equal(logits(load_model(str(folder))), whole)


@pytest.mark.parametrize(("damage", "sentence"), [
    (lambda content: content[:-100], "model.safetensors is damaged or cut short"),
    (lambda content: content[:20], "model.safetensors is damaged or cut short"),
    (lambda content: b"", "model.safetensors is empty; fetch it again"),
    (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer and not the weights"),
    (lambda content: b"<html>404 not found</html>", "model.safetensors is damaged or cut short"),
])
def test_a_file_that_holds_no_weights_is_named(folder: Path, damage: Callable[[bytes], bytes], sentence: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    for read in (load_model, stored_dtype):
        with pytest.raises(ValueError, match=sentence):
            read(str(folder))


def test_shards_are_those_of_the_index(folder: Path) -> None:
    model, names = load_model(str(folder)), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    model.save_pretrained(folder / "shards", max_shard_size=60_000)
    shards = folder / "shards"
    assert len(weight_files(shards)) > 1
    assert torch.equal(logits(load_model(str(shards))), logits(model))
    weight_files(shards)[-1].unlink()
    with pytest.raises(ValueError, match=r"model-0000\d-of-0000\d.safetensors of its \d shards is missing; fetch it again"):
        load_model(str(shards))
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weights": names}))
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is no index of shards"):
        load_model(str(shards))


def test_what_lies_beside_the_weights_is_not_read(folder: Path) -> None:
    before = fingerprint(str(folder))
    save_file({"a": torch.ones(200, 200, dtype=torch.bfloat16)}, folder / "adapter_model.safetensors", {"format": "pt"})
    assert (stored_dtype(str(folder)), dtype_note(str(folder), "float32")) == ("float32", None)
    assert fingerprint(str(folder)) == before
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no .safetensors file in it that transformers would read"):
        load_model(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter and no model; merge it into its base model first"):
        load_model(str(folder))


@pytest.mark.parametrize(("dtype", "found", "note"), [
    (torch.float32, "float32", None), (torch.bfloat16, "bfloat16", None),
    (torch.float16, "float32", "the model's weights are stored in float16; here, and in an export, they are float32"),
    (torch.float64, "float32", "the model's weights are stored in float64; "),
])
def test_another_type_is_said(folder: Path, dtype: torch.dtype, found: str, note: str | None) -> None:
    rewrite(folder, lambda weights: {name: weight.to(dtype) for name, weight in weights.items()})
    assert stored_dtype(str(folder)) == found
    said = dtype_note(str(folder), found)
    assert said is note is None or said.startswith(note)


def test_the_type_is_that_of_most_weights(folder: Path) -> None:
    """Norms often stay in fp32 and come first by name."""
    rewrite(folder, lambda w: {name: x.to(torch.bfloat16 if x.ndim > 1 else torch.float32) for name, x in w.items()})
    assert stored_dtype(str(folder)) == "bfloat16"
    assert dtype_note(str(folder), "bfloat16").startswith("the model's weights are stored in float32; ")


def test_parts_are_restored_from_the_files_or_from_copies(folder: Path) -> None:
    """Those that a file has under another name, or otherwise, have a copy."""
    parameters = dict(load_model(str(folder), torch.bfloat16).named_parameters())
    parts = [(name, 5, parameter.detach().float().view(-1)[5:12]) for name, parameter in parameters.items()]
    parts[0], parts[1] = ("another", 5, parts[0][2]), (parts[1][0], 5, parts[1][2] * 2)
    base = Base(str(folder), parts, torch.bfloat16)
    assert [copy is None for copy in base._copies] == [False, False] + [True] * (len(parts) - 2)
    before = [values.clone() for *_, values in parts]
    for *_, values in parts:
        values.fill_(7)
    base.restore()
    assert all(torch.equal(values, old) for (*_, values), old in zip(parts, before))
    rewrite(folder, lambda weights: {name: weight + 1 for name, weight in weights.items()})
    with pytest.raises(ValueError, match="its weights have changed while they are in use; put those back with which the study"):
        base.restore()
