import copy
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from raysearch.models.model import (
    ModelSize,
    fingerprint,
    load_model,
    model_folder,
    model_size,
    multiply_in_fp32,
    prunable_parameters,
)


def test_gpt2_matrices(tiny_model: Path) -> None:
    found = prunable_parameters(load_model(str(tiny_model)), "matrices")
    assert len(found) == 2 * 4
    assert found[0].name == "transformer.h.0.attn.c_attn.weight"
    assert found[0].shape == (32, 96)
    assert all(p.transposed for p in found)


def test_all_adds_the_embeddings_once_when_tied(tiny_model: Path) -> None:
    model = load_model(str(tiny_model))
    names = [p.name for p in prunable_parameters(model, "all")]
    assert names[:2] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert len(names) == 2 + 8
    assert "lm_head.weight" not in names


@pytest.mark.parametrize(("model", "num_per_layer"), [
    (LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=2)), 7),
    (GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=2)), 4),
    (OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
                              word_embed_proj_dim=32)), 6),
])
def test_other_architectures(model: torch.nn.Module, num_per_layer: int) -> None:
    found = prunable_parameters(model, "matrices")
    assert len(found) == 2 * num_per_layer
    assert not any(p.transposed for p in found)
    extra = {p.name for p in prunable_parameters(model, "all")} - {p.name for p in found}
    assert any("embed" in name for name in extra)


@pytest.mark.parametrize("layer", [torch.nn.Linear(24, 40), torch.nn.Linear(24, 40, bias=False), Conv1D(40, 24)])
def test_fp32_products_of_bf16_are_rounded_once(layer: torch.nn.Module) -> None:
    torch.manual_seed(0)
    layer = layer.to(torch.bfloat16)
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    exact = copy.deepcopy(layer).double()(x.double())
    multiply_in_fp32(torch.nn.ModuleList([layer]))
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()  # half a unit in the last place
    y.float().sum().backward()
    columns = x.double().sum((0, 1))
    expected = columns.expand(40, 24) if isinstance(layer, torch.nn.Linear) else columns[:, None].expand(24, 40)
    assert torch.allclose(layer.weight.grad.double(), expected, rtol=2**-8, atol=1e-6)


def test_fingerprint_follows_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_model))
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1
    assert fingerprint(str(tmp_path / "a")) != fingerprint(str(tmp_path / "b"))


def test_bad_folders_are_one_sentence(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="no such folder; give a local folder"):
        model_folder("gpt2-of-nobody")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no .safetensors file in it"):
        model_folder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path))

GPT2 = ModelSize(124_439_808, 768, 12, 50_257)


def test_a_model_is_measured_without_its_weights(tmp_path: Path, tiny_model: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert model_size(str(tmp_path)) == GPT2  # tied embeddings once
    assert model_size(str(tiny_model)).num_layers == 2
