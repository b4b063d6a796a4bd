"""The loss inside the forward: transformers' own, whose gradients are made in the forward pass, part after part."""

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faults import refusing
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from raysearch.training.loss import IGNORED, _check_cache, as_teacher, linear_cross_entropy, next_token_loss, take_loss

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES: dict[str, Callable[[], Any]] = {  # logits are the head of the hidden states; they are capped; not in the table
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)),
    "gemma2": lambda: AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)),
}


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_loss_that_transformers_gives(family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().train()
    tokens = torch.randint(64, (3, 20))
    wanted = model(input_ids=tokens, labels=tokens).loss
    wanted_gradients = gradients(model, wanted)
    take_loss(model)
    loss = model(input_ids=tokens, loss=next_token_loss)
    assert torch.allclose(loss, wanted, rtol=1e-6)
    for name, gradient in gradients(model, loss).items():
        assert torch.allclose(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-8), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_is_followed(family: str) -> None:
    """(1 - alpha) CE + alpha tau^2 KL, position by position and class by class."""
    torch.manual_seed(0)
    model, dense = FAMILIES[family]().train(), FAMILIES[family]().train()
    tokens = torch.randint(64, (2, 5))
    alpha, tau = 0.3, 2.0
    found, wanted = (each(input_ids=tokens).logits.double() for each in (model, dense))
    total: Any = 0.0
    for row in range(2):
        for place in range(4):
            cross = -found[row, place].log_softmax(0)[tokens[row, place + 1]]
            apart: Any = 0.0
            for each in range(64):
                p, q = ((logits[row, place] / tau).softmax(0)[each] for logits in (wanted.detach(), found))
                apart = apart + p * (p.log() - q.log())
            total = total + ((1 - alpha) * cross + alpha * tau**2 * apart) / 8
    wanted_gradients = gradients(model, total)
    take_loss(model)
    teacher = (wanted.detach().float(), torch.tensor(alpha), torch.tensor(tau))
    loss = model(input_ids=tokens, loss=next_token_loss, teacher=teacher)
    assert torch.allclose(loss.double(), total, rtol=1e-5)
    for name, gradient in gradients(model, loss).items():
        assert torch.allclose(gradient, wanted_gradients[name], rtol=1e-3, atol=1e-7), name


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_followed(family: str) -> None:
    """SquareHead, number by number."""
    torch.manual_seed(0)
    model, dense = FAMILIES[family]().train(), FAMILIES[family]().train()
    tokens = torch.randint(64, (2, 5))
    with torch.no_grad():
        wanted = dense(input_ids=tokens, output_hidden_states=True)
    output = model(input_ids=tokens, labels=tokens, output_hidden_states=True)
    total: Any = output.loss
    for block in (1, 2):
        error = size = 0.0
        for found, of_dense in zip(output.hidden_states[block].flatten(), wanted.hidden_states[block].flatten().tolist()):
            error, size = error + (found - of_dense) ** 2, size + of_dense**2
        total = total + 0.7 * error / (size + 320 * torch.finfo(torch.bfloat16).eps)
    wanted_gradients = gradients(model, total)
    take_loss(model)
    teacher = (wanted.logits, torch.tensor(0.0), torch.tensor(1.0))
    loss = model(input_ids=tokens, loss=next_token_loss, teacher=teacher, states=(wanted.hidden_states[1:], torch.tensor(0.7)))
    assert torch.allclose(loss, total, rtol=1e-5)
    for name, gradient in gradients(model, loss).items():
        assert torch.allclose(gradient, wanted_gradients[name], rtol=1e-3, atol=1e-7), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_teacher_says_what_the_model_says(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr("raysearch.training.loss.ALIGNED", 48)  # which 64 classes are not a multiple of
    model, student = FAMILIES[family]().eval(), FAMILIES[family]()
    tokens = torch.randint(64, (2, 5))
    with torch.no_grad():
        wanted = model(input_ids=tokens, output_hidden_states=True)
        found = as_teacher(model, compiled=True)(input_ids=tokens, output_hidden_states=True)
    assert torch.allclose(found.logits[..., :64], wanted.logits, rtol=1e-5, atol=1e-6)
    take_loss(student)
    losses = [student(input_ids=tokens, loss=next_token_loss, teacher=(logits, torch.tensor(0.5), torch.tensor(2.0)))
              for logits in (wanted.logits, found.logits)]
    assert found.logits.shape[-1] == 96
    assert torch.allclose(*losses, rtol=1e-5)
    for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gpt2_too_and_without_a_loss_nothing_changed(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    tokens = torch.arange(60).view(3, 20)
    wanted = model(input_ids=tokens, labels=tokens)
    take_loss(model)
    assert torch.allclose(model(input_ids=tokens, loss=next_token_loss), wanted.loss, rtol=1e-6)
    again = model(input_ids=tokens, labels=tokens)
    assert torch.equal(again.loss, wanted.loss)
    assert torch.equal(again.logits, wanted.logits)
    assert model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (3, 7)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_parts", [1, 3, 50])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])  # where the vocabulary is padded
def test_gradients_do_not_depend_on_the_parts(has_bias: bool, num_parts: int, device: str,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(num_parts)
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
                            for shape in ((50, 8), (13, 8), (13,)))
    targets = torch.randint(13, (50,), generator=generator)
    targets[::7] = IGNORED
    inputs = [hidden, weight, *([bias] if has_bias else [])]
    of_teacher, alpha, tau = torch.randn(50, 13, generator=generator, dtype=torch.float64), torch.tensor(0.4), torch.tensor(3.0)
    logits = F.linear(*inputs)
    apart = F.kl_div((logits / 3).log_softmax(-1), (of_teacher / 3).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    mixed = (0.6 * F.cross_entropy(logits, targets, ignore_index=IGNORED) + 0.4 * 9 * apart[targets != IGNORED].mean())
    wanted_mixed = torch.autograd.grad(2 * mixed, inputs, retain_graph=True)
    wanted = torch.autograd.grad(2 * F.cross_entropy(logits, targets, ignore_index=IGNORED), inputs)
    monkeypatch.setattr("raysearch.training.loss.LOGITS_AT_ONCE", 13 * -(-50 // num_parts))
    single = [tensor.detach().float().to(device).requires_grad_() for tensor in inputs]
    targets, of_teacher, alpha, tau = (tensor.to(device) for tensor in (targets, of_teacher.float(), alpha, tau))
    for teacher, exacts in ((None, wanted), ((of_teacher, alpha, tau), wanted_mixed)):
        loss = 2 * linear_cross_entropy(single[0], single[1], single[2] if has_bias else None, targets, teacher)
        for gradient, exact in zip(torch.autograd.grad(loss, single), exacts):
            assert torch.allclose(gradient.double().cpu(), exact, rtol=1e-4, atol=1e-7)


def test_a_loss_of_ones_own_gets_hidden_states_and_head(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    take_loss(model)
    tokens = torch.arange(20).view(1, 20)
    seen = {}

    def loss(hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> torch.Tensor:
        seen.update(hidden=hidden.shape, logits=head(hidden[:, -1]).shape, tokens=given)
        return hidden.sum()

    model(input_ids=tokens, loss=loss)
    assert (seen["hidden"], seen["logits"]) == ((1, 20, model.config.n_embd), (1, model.config.vocab_size))
    assert torch.equal(seen["tokens"], tokens)


def test_a_cache_that_cannot_be_written_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture) -> None:
    def line() -> str:
        _check_cache()
        return capsys.readouterr().out

    for folder in (tmp_path, tmp_path / "made"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        assert line() == ""
    with refusing():  # too little is free
        assert line() == (f"{tmp_path / 'made'}: compiled code cannot be kept there (File too large); set "
                          "TORCHINDUCTOR_CACHE_DIR to a folder that the next gang finds\n")
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert line().startswith(f"{tmp_path}/file/cache: compiled code cannot be kept there (Not a directory)")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/cache")  # read-only, for root too
    assert line().startswith("/proc/cache: compiled code cannot be kept there (")


COMPILES = """
import torch
import torch._functorch.config
from raysearch.training.loss import _check_cache, linear_cross_entropy
torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
_check_cache()
generator = torch.Generator().manual_seed(0)
hidden, weight = (torch.randn(shape, generator=generator, requires_grad=True) for shape in ((8, 4), (5, 4)))
loss = torch.compile(linear_cross_entropy)(hidden, weight, None, torch.arange(8) % 5)
loss.backward()
print(loss.item(), weight.grad.square().sum().item())
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")
def test_gangs_share_a_cache_whatever_happened_to_it(tmp_path: Path) -> None:
    """One is killed while it compiles, two then compile at once, and the next finds every entry damaged."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
                   "PYTHONPATH": str(Path(__file__).parents[2])}

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", COMPILES], env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    def numbers(process: subprocess.Popen) -> list[float]:
        out, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors[-3000:]
        return [float(number) for number in out.split()]

    def entries() -> list[Path]:
        return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]

    killed = start()
    while not entries():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    both = [numbers(process) for process in [start(), start()]]
    assert both[0] == both[1]
    parts = [path for path in entries() if {"fxgraph", "aotautograd"} & set(path.parts)]
    assert parts
    for path in parts:
        path.write_bytes(b"of another torch")
    assert numbers(start()) == both[0]
