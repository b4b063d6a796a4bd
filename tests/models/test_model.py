import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    OlmoeConfig,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    Qwen2MoeConfig,
    RwkvConfig,
    XLNetConfig,
)
from transformers.pytorch_utils import Conv1D

from raysearch.models.model import (
    ModelSize,
    check_causal,
    context_limit,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
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
    with pytest.raises(ValueError, match=r"^model nowhere: no such folder; give a local folder"):
        load_config("nowhere")
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path))

GPT2 = ModelSize(124_439_808, 768, 12, 50_257)


def test_a_model_is_measured_without_its_weights(tmp_path: Path, tiny_model: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert model_size(str(tmp_path)) == GPT2  # tied embeddings once
    assert model_size(str(tiny_model)).num_layers == 2


@pytest.mark.parametrize(("config", "limit"), [
    (GPT2Config(n_positions=64), 64), (LlamaConfig(max_position_embeddings=32), 32), (MptConfig(max_seq_len=48), 48),
    (RwkvConfig(context_length=80), 80), (BloomConfig(), math.inf), (MambaConfig(), math.inf)])
def test_the_context_has_several_names(config: PretrainedConfig, limit: float) -> None:
    assert context_limit(config) == limit


def test_a_folder_without_a_tokenizer_has_none(tiny_model: Path, tmp_path: Path) -> None:
    """transformers makes up an empty one, which encodes every text to nothing."""
    shutil.copytree(tiny_model, tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="its tokenizer has no tokens, or its files are missing; save the tokenizer"):
        load_tokenizer(str(tmp_path / "model"))
    (tmp_path / "model" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path / "model"))


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
           "shared_expert_intermediate_size": 16, "head_dim": 8, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16,
           "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize(("config", "is_transposed"), [
    (MixtralConfig, False), (Qwen2MoeConfig, False), (OlmoeConfig, False), (GraniteMoeConfig, False), (GptOssConfig, True)])
def test_experts_are_pruned_like_other_matrices(config: type[PretrainedConfig], is_transposed: bool) -> None:
    """Nearly all matrices of such a model are in one parameter for all experts; routers stay."""
    model = AutoModelForCausalLM.from_config(config(**EXPERTS))
    found = prunable_parameters(model, "matrices")
    experts = [p for p in found if len(p.shape) == 3]
    assert [p.name.rpartition(".")[2] for p in experts] == ["gate_up_proj", "down_proj"]
    assert all(p.transposed is is_transposed for p in experts)
    assert [sorted(p.shape) for p in experts] == [[4, 32, 32], [4, 16, 32]]
    left = {name for name, parameter in model.named_parameters() if parameter.ndim > 1} - {p.name for p in found}
    assert not [name for name in left if not name.endswith(("embed_tokens.weight", "lm_head.weight", "router.weight",
                                                            "gate.weight", "proj_bias"))]
    up = experts[0]
    whole = torch.randn(up.shape)
    rows = up.rows(whole.view(-1))
    assert torch.equal(rows[:32], whole[0].T if is_transposed else whole[0])  # of 32 inputs: an output of the first expert each
    assert torch.equal(up.stored(rows), whole.view(-1))


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}


def test_a_model_that_looks_ahead_is_refused() -> None:
    """Hugging Face loads them as causal models, and their perplexity would look like one."""
    for config in (BertConfig(**SMALL), XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=32)):
        with pytest.raises(ValueError, match=r"looks ahead: its logits for a token depend on later ones, so it is no causal"):
            check_causal(AutoModelForCausalLM.from_config(config).eval())
    for config in (BertConfig(**SMALL, is_decoder=True), *(family(**EXPERTS) for family in (MixtralConfig, MambaConfig))):
        check_causal(AutoModelForCausalLM.from_config(config).eval())
        check_causal(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())


def test_a_model_that_tokens_alone_do_not_run_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    model.model.layers[0].mlp = torch.nn.Linear(7, 7)
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM gives no logits for tokens alone \(.*; give a causal"):
        check_causal(model.eval())
