"""A model on sparse kernels gives the dense model's outputs, and stays dense where that is faster."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layers import assert_product, mask_of
from transformers import GPT2Config, GPT2LMHeadModel

from raysearch.kernels import compress, linear
from raysearch.kernels.backends import BACKENDS, Backend
from raysearch.kernels.decode import decode_linear
from raysearch.kernels.dispatch import Choice
from raysearch.models import sparse
from raysearch.models.sparse import SparseLinear, sparsify_for_inference


def pruned_model(sparsity: float = 0.9) -> Any:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=128, n_layer=2, n_head=4, bos_token_id=0,
                                       eos_token_id=0)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".h." in name:
            parameter.data *= mask_of("unstructured", 1, tuple(parameter.shape), sparsity, seed=len(name))
    return model


def choose(monkeypatch: pytest.MonkeyPatch, backend: str, ratio: float) -> None:
    """As if `backend` had won everywhere, and the whole model had become `ratio` times faster."""
    monkeypatch.setattr(sparse, "best_backend", lambda weight, tokens, cache: Choice(
        backend=backend, variant=0, dense_us=20.0, sparse_us=10.0))
    monkeypatch.setattr(sparse, "_model_ratio", lambda *_: ratio)


def sparse_layers(model: Any) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def test_a_model_runs_on_the_chosen_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("raysearch.kernels.cpu").library()
    choose(monkeypatch, "csr", 1.5)
    model = pruned_model()
    tokens = torch.arange(60).view(2, 30)
    before = model(tokens).logits
    report = sparsify_for_inference(model, num_tokens=[60, 512], cache=tmp_path / "decisions.json")
    assert len(sparse_layers(model)) == 8
    assert all(layer.dense is None and set(layer.packed) == {"csr"} for layer in sparse_layers(model))
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)
    assert report.model_ratio == {64: 1.5, 512: 1.5}
    assert [layer.name for layer in report.layers][:2] == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    assert report.layers[0].shape == (384, 128)  # [outputs, inputs], though Conv1D keeps it the other way round
    assert report.layers[0].sparsity == pytest.approx(0.9, abs=0.02)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 33)


@pytest.mark.parametrize(("pattern", "block"), [("2:4", 1), ("block", 32)])
def test_a_loaded_layer_is_tried_by_its_pattern(pattern: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of weights says which are kept, and no pattern."""
    model, tried = pruned_model(0.0), []
    mask = mask_of(pattern, block, (384, 128), 0.5)
    weight = model.transformer.h[0].attn.c_attn.weight.detach().T * mask
    model.transformer.h[0].attn.c_attn = SparseLinear(compress(weight, mask), None)
    monkeypatch.setattr(sparse, "best_backend", lambda weight, *_: tried.append(weight) or Choice(backend="dense"))
    monkeypatch.setattr(sparse, "_model_ratio", lambda *_: 1.0)
    sparsify_for_inference(model, num_tokens=60)
    assert [(each.pattern, each.block) for each in tried] == [(pattern, block)]
    assert torch.equal(tried[0].to_dense(), weight)


@pytest.mark.parametrize(("ratio", "is_kept"), [(1.04, True), (1.02, False), (0.9, False)])
def test_a_gain_within_the_noise_is_none(ratio: float, is_kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold both forms of the weights."""
    pytest.importorskip("raysearch.kernels.cpu").library()
    monkeypatch.setattr(sparse, "best_backend", lambda weight, tokens, cache: Choice(
        backend="csr", variant=0, dense_us=20.0, sparse_us=10.0))
    monkeypatch.setattr(sparse, "time_in_turn", lambda *_, **__: [[ratio] * 3, [1.0] * 3])
    model = pruned_model()
    found = sparsify_for_inference(model, num_tokens=64)
    assert found.model_ratio == {64: ratio if is_kept else 1.0}
    assert bool(sparse_layers(model)) == is_kept


def test_the_model_goes_back_to_dense_when_the_sum_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "csr", 1.0)
    model = pruned_model()
    layers = [type(module) for module in model.modules()]
    assert sparsify_for_inference(model, num_tokens=64).model_ratio == {64: 1.0}
    assert [type(module) for module in model.modules()] == layers


def test_dense_layers_are_not_touched(tmp_path: Path) -> None:
    model = pruned_model(0.1)
    layers = [id(module) for module in model.modules()]
    report = sparsify_for_inference(model, num_tokens=64, cache=tmp_path / "decisions.json")
    assert report.layers == []
    assert [id(module) for module in model.modules()] == layers


def test_a_layer_takes_the_choice_of_the_next_number_of_tokens() -> None:
    mask = mask_of("unstructured", 1, (96, 64), 0.9)
    dense = torch.where(mask, torch.randn(96, 64), 0)
    made = SparseLinear(compress(dense, mask), None, {64: Choice(backend="csr"), 8: Choice(backend="dense")}, dense)
    assert [made._choice(n).backend for n in (1, 8, 9, 64, 65, 5000)] == ["dense", "dense", "csr", "csr", "csr", "csr"]
    for num_tokens in (5, 40):
        x = torch.randn(num_tokens, 64)
        assert_product(made(x), x, dense, None)


def test_a_backend_gets_no_more_tokens_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    few = Backend("few", lambda weight, dtype, device, tokens: [0] if tokens <= 16 else [], lambda weight, _: weight,
                  lambda x, packed, bias, _: linear(x, packed, bias) if len(x) <= 16 else x.new_full((len(x), 1), torch.nan))
    monkeypatch.setitem(BACKENDS, "few", few)
    choose(monkeypatch, "few", 1.5)
    model = pruned_model()
    tokens = torch.arange(60)[None]
    before, weight = model(tokens).logits, model.transformer.h[0].attn.c_attn.weight
    sparsify_for_inference(model, num_tokens=16)
    assert sparse_layers(model)[0].dense.data_ptr() == weight.data_ptr()  # no copy, and in the order of the family
    assert [layer._choice(n).backend for layer in sparse_layers(model)[:1] for n in (1, 16, 17)] == ["few", "few", "dense"]
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)
    with pytest.raises(ValueError, match="at most 8 tokens, got 9"):
        decode_linear(torch.zeros(9, 8), None, None, 1)


def test_the_whole_of_it_on_this_machine(tmp_path: Path) -> None:
    model = pruned_model(0.98)
    tokens = torch.arange(64)[None]
    before = model(tokens).logits
    report = sparsify_for_inference(model, num_tokens=64, cache=tmp_path / "decisions.json")
    assert len(report.layers) == 8
    assert report.model_ratio[64] >= 1
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)
    again = sparsify_for_inference(model, num_tokens=64, cache=tmp_path / "decisions.json")  # also of what is sparse by now
    assert len(again.layers) == 8
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)
