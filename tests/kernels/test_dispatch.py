"""Decisions: sparse only where it wins, kept on disk, made anew when what they depend on changes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import mask_of

from raysearch.kernels import dispatch
from raysearch.kernels.backends import Backend
from raysearch.kernels.dispatch import best_backend, decision_key, token_bucket
from raysearch.kernels.weight import SparseWeight, compress


def weight(sparsity: float = 0.9) -> SparseWeight:
    mask = mask_of("unstructured", 1, (256, 256), sparsity)
    return compress(torch.where(mask, torch.randn(256, 256), 0), mask)



class Packed(tuple):
    """What `pack` makes, with the fields that copying asks for."""

    def __new__(cls, *values: Any) -> "Packed":
        return super().__new__(cls, values)


def use(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    made = Backend("try", lambda *_: [7], lambda packed, _: Packed(packed.to_dense()), run)
    monkeypatch.setattr(dispatch, "BACKENDS", {"try": made})


def dense(x: torch.Tensor, packed: Any, bias: torch.Tensor | None, variant: int) -> torch.Tensor:
    return torch.nn.functional.linear(x, packed[0], bias)


def test_a_slower_backend_loses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(0.003)
        return dense(*arguments)

    use(monkeypatch, slow)
    choice = best_backend(weight(), 64, tmp_path / "decisions.json")
    assert (choice.backend, choice.ratio) == ("dense", 1.0)
    assert choice.sparse_us is not None
    assert choice.sparse_us > 3000 > (choice.dense_us or 9999)


def test_a_faster_backend_wins_and_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = torch.nn.functional.linear
    slow = {"on": True}

    def slower(*arguments: Any, **options: Any) -> torch.Tensor:
        time.sleep(0.002 if slow["on"] else 0)
        return real(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "linear", slower)  # dense
    use(monkeypatch, lambda x, packed, bias, variant: real(x, packed[0], bias))
    path = tmp_path / "decisions.json"
    choice = best_backend(weight(0.92), 64, path)
    assert (choice.backend, choice.variant) == ("try", 7)
    assert choice.ratio > 1.03
    slow["on"] = False
    assert best_backend(weight(0.92), 60, path) == choice  # the same bucket: read, not timed
    assert best_backend(weight(0.918), 64, path) == choice  # nearly the same density
    assert len(json.loads(path.read_text())) == 1
    path.write_text('{"torn')
    best_backend(weight(0.92), 64, path)
    assert list(json.loads(path.read_text())) == [decision_key(weight(0.92), 64)]


@pytest.mark.filterwarnings("ignore:backend try")
def test_a_wrong_or_a_refusing_backend_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, lambda x, packed, bias, variant: x @ packed[0].T * 1.001)
    with pytest.warns(UserWarning, match=r"backend try 7 is left out: its answer differs from dense by 1.0e-03"):
        assert best_backend(weight(), 64, tmp_path / "a.json").sparse_us is None

    def refuse(*_: Any) -> torch.Tensor:
        raise RuntimeError("this shape is not taken")

    use(monkeypatch, refuse)
    with pytest.warns(UserWarning, match="backend try 7 is left out: this shape is not taken"):
        assert best_backend(weight(), 64, tmp_path / "b.json").backend == "dense"


def test_what_a_decision_depends_on() -> None:
    keys = {decision_key(weight(), 64), decision_key(weight(0.5), 64), decision_key(weight(), 128),
            decision_key(compress(torch.ones(256, 256).bfloat16(), torch.ones(256, 256, dtype=torch.bool)), 64)}
    assert len(keys) == 4
    assert len({decision_key(weight(sparsity), 64) for sparsity in (0.97, 0.95, 0.93, 1.0)}) == 4
    assert [token_bucket(n) for n in (1, 2, 3, 64, 65, 4095, 4096, 5700, 5900, 32768)] == [
        1, 2, 4, 64, 128, 4096, 4096, 4096, 8192, 32768]
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        best_backend(weight(), 0)


def test_never_slower_than_dense_on_this_machine(tmp_path: Path) -> None:
    for sparsity in (0.4, 0.98):
        for num_tokens in (1, 64, 512):
            choice = best_backend(weight(sparsity), num_tokens, tmp_path / "decisions.json")
            assert choice.ratio >= 1
