"""The kernel benchmark's cases, measured small, on this machine's processor."""

import math

import pytest
import torch

from raysearch.kernels.benchmark import CPU, GRID, MUST, Case, header, run_grid
from raysearch.kernels.weight import random_mask

DEVICE = torch.device("cpu")


@pytest.mark.parametrize("case", [Case((64, 128), "unstructured", 1, 0.9, ()), Case((64, 128), "2:4", 1, 0.5, ()),
                                  Case((72, 200), "block", 32, 0.5, ())])
def test_a_mask_has_the_pattern_of_its_case(case: Case) -> None:
    torch.manual_seed(0)
    mask = random_mask(case.shape, case.pattern, case.block, 1 - case.sparsity)
    assert (mask.shape, mask.dtype) == (case.shape, torch.bool)
    if case.pattern == "2:4":
        assert (mask.view(-1, 4).sum(dim=1) == 2).all()
    elif case.pattern == "block":
        padded = torch.nn.functional.pad(mask, (0, -200 % 32, 0, -72 % 32))
        filled = padded.view(3, 32, 7, 32).transpose(1, 2).flatten(2).sum(dim=-1)  # kept weights of each block
        whole = torch.tensor([32, 32, 8])[:, None] * torch.tensor([32] * 6 + [8])
        assert ((filled == 0) | (filled == whole)).all()
        assert 0 < (filled == 0).sum() < filled.numel()
    else:
        std = math.sqrt(0.1 * 0.9 / mask.numel())
        assert abs(float(mask.float().mean()) - 0.1) < 5 * std


def test_the_cases_cover_what_the_kernels_are_for() -> None:
    assert {case.pattern for case in MUST} == {case.pattern for case in GRID} == {"unstructured", "2:4", "block"}
    assert len(set(GRID)) == len(GRID)
    for case in (*MUST, *GRID, *CPU):
        assert case.shape[1] % 4 == 0
        assert case.num_tokens


def test_a_record_holds_what_was_measured() -> None:
    said: list[str] = []
    records = run_grid([Case((128, 256), "unstructured", 1, 0.9, (8, 64)), Case((96, 64), "block", 32, 0.5, (32,))], DEVICE,
                       said.append)
    assert [(record["outputs"], record["num_tokens"], record["dtype"]) for record in records] == [
        (128, 8, "float32"), (128, 64, "float32"), (96, 32, "bfloat16")]
    assert len(said) == 3
    for record in records:
        assert record["dense_us"] > 0
        assert set(record["all_us"]) <= {"csr 0", "amx 0"}
        if record["all_us"]:  # a compiler, and AMX for the blocks
            assert record["sparse_us"] == min(record["all_us"].values())
            assert record["ratio"] == record["dense_us"] / record["sparse_us"]
            assert record["error"] < (1e-6 if record["dtype"] == "float32" else 2**-8)
        assert (record["dispatched"] == "dense") == (record["dispatched_ratio"] == 1.0)
    assert set(header(DEVICE)) == {"date", "device", "torch"}
