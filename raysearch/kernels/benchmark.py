"""Every backend against dense, and against torch's own sparse products, over a grid of layers: `raysearch bench-kernels`.

Each number is the median over replays of CUDA graphs, dense and all candidates in turn, walking through copies of the
weight that are larger than the L2 cache, on random data. Outputs are poisoned with NaN before they are checked against
fp64. What the dispatcher would choose is then timed again by itself against dense: that is its honest ratio.
"""

import datetime
import functools
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raysearch.kernels.device import device_name
from raysearch.kernels.dispatch import Copies, time_in_turn, wins
from raysearch.kernels.weight import compress, random_mask

NUM_ROUNDS = 11


class Case(NamedTuple):
    shape: tuple[int, int]
    """Outputs, inputs."""
    pattern: str
    block: int
    sparsity: float
    num_tokens: Sequence[int]


SIZES = ((3072, 768), (6400, 1600), (1600, 6400), (4096, 11008))
"""GPT-2 small, GPT-2 XL (up and down), and a model of 7 B."""
MUST = (
    Case((4096, 11008), "2:4", 1, 0.5, (8192, 16384)),
    Case((1600, 6400), "2:4", 1, 0.5, (8192, 16384)),
    Case((4096, 11008), "block", 64, 0.9, (4096,)),
    Case((4096, 11008), "block", 128, 0.9, (4096,)),
    Case((1600, 6400), "block", 64, 0.9, (16384,)),
    *(Case((4096, 11008), "unstructured", 1, sparsity, (1, 2, 4, 8, 16)) for sparsity in (0.5, 0.7, 0.9)),
    Case((4096, 11008), "unstructured", 1, 0.9, (4096,)),
)
"""The cases of issue 5."""
GRID = tuple(
    Case(shape, pattern, block, sparsity, (1, 4, 16, 256, 4096, 32768) if shape[0] * shape[1] < 4e7 else (1, 4, 16, 256, 4096))
    for pattern, block, sparsity in (("unstructured", 1, 0.5), ("unstructured", 1, 0.7), ("unstructured", 1, 0.9),
                                     ("2:4", 1, 0.5), ("block", 64, 0.9), ("block", 32, 0.9), ("block", 128, 0.9),
                                     ("block", 64, 0.8), ("block", 16, 0.9))
    for shape in SIZES)
CPU = (Case((3072, 768), "unstructured", 1, 0.9, (64,)), Case((4096, 4096), "unstructured", 1, 0.9, (64, 512)),
       Case((3072, 768), "block", 32, 0.9, (512,)), Case((4096, 4096), "block", 32, 0.9, (512,)))


def run_case(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    """One record for each number of tokens; times in microseconds, ratios to dense."""
    mask = random_mask(case.shape, case.pattern, case.block, 1 - case.sparsity, device=device)
    dtype = torch.float32 if device.type == "cpu" and case.block == 1 else torch.bfloat16
    weight = torch.where(mask, torch.randn(case.shape, device=device) / case.shape[1] ** 0.5, 0).to(dtype)
    layer = Copies(compress(weight, mask, case.pattern, case.block))
    dense = layer.dense()
    for num_tokens in case.num_tokens:
        xs = layer.inputs(num_tokens)
        candidates = [(name, variant, runs) for name, variant, runs in layer.candidates(num_tokens) if _runs(runs[0], xs[0])]
        peers = [(name, run) for name, run in _peers(case, weight, num_tokens) if _runs(run, xs[0])]
        rows = slice(0, min(64, num_tokens))
        exact = xs[0][rows].double() @ weight.double().T
        errors = [_error(runs[0], xs[0], exact, rows) for *_, runs in candidates]
        peer_errors = [_error(run, xs[0], exact, rows) for _, run in peers]
        times = time_in_turn([layer.bound(runs, xs) for runs in (dense, *(runs for *_, runs in candidates))]
                             + [layer.bound([run] * layer.num_copies, xs) for _, run in peers], device, NUM_ROUNDS)
        medians = [statistics.median(column) / layer.num_copies for column in times]
        ours = medians[1:1 + len(candidates)]
        best = ours.index(min(ours)) if ours else None
        winner, again = "dense", [1.0]
        if best is not None and wins(times[0], times[1 + best]):  # the dispatcher's rule, and a third timing of its choice
            name, variant, chosen = candidates[best]
            pair = [layer.bound(dense, xs), layer.bound(chosen, xs)]
            if wins(*time_in_turn(pair, device, NUM_ROUNDS)):
                winner, again = f"{name} {variant}", [d / s for d, s in zip(*time_in_turn(pair, device, NUM_ROUNDS))]
        peer_us = {name: us for (name, _), us in zip(peers, medians[1 + len(candidates):])}
        yield {
            "outputs": case.shape[0], "inputs": case.shape[1], "pattern": case.pattern, "block": case.block,
            "sparsity": case.sparsity, "dtype": str(dtype).removeprefix("torch."), "num_tokens": num_tokens,
            "dense_us": medians[0],
            "best": None if best is None else f"{candidates[best][0]} {candidates[best][1]}",
            "sparse_us": None if best is None else ours[best], "ratio": None if best is None else medians[0] / ours[best],
            "error": max(errors, default=None), "dispatched": winner,
            "dispatched_ratio": statistics.median(again), "peers_us": peer_us, "peers_error": max(peer_errors, default=None),
            "all_us": {f"{name} {variant}": us for (name, variant, _), us in zip(candidates, ours)}}


def header(device: torch.device) -> dict[str, Any]:
    """What every number depends on."""
    fields = {"date": datetime.date.today().isoformat(), "device": device_name(str(device)), "torch": torch.__version__}
    if device.type == "cuda":
        fields |= {"cuda": torch.version.cuda, "cusparselt": torch.backends.cusparselt.version()}
    return fields


def _runs(run: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """False where the product does not fit this GPU (Triton's own kind of error, which is no RuntimeError)."""
    try:
        run(x)
        if x.is_cuda:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    except Exception as error:
        if type(error).__name__ != "OutOfResources":
            raise
        return False
    return True


def _error(run: Callable[[Tensor], Tensor], x: Tensor, exact: Tensor, rows: slice) -> float:
    """Relative to fp64, norm by norm; NaN where an output was not written."""
    poison = torch.full((len(x), exact.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
    del poison  # the allocator gives these bytes to the output
    y = run(x)
    return float("nan") if y.isnan().any() else float((y[rows].double() - exact).norm() / exact.norm())


def _peers(case: Case, weight: Tensor, num_tokens: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """torch's own sparse products of the same weight."""
    if weight.device.type == "cpu":
        if weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_tokens)
            yield "oneDNN, packed before", lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return
    if case.pattern == "2:4" and num_tokens % 8 == 0 and num_tokens >= 256:
        from torch.sparse import to_sparse_semi_structured

        semi = to_sparse_semi_structured(weight)
        yield "torch 2:4", lambda x: torch.nn.functional.linear(x, semi)
    whole = case.shape[0] % case.block == 0 and case.shape[1] % case.block == 0  # torch takes no ragged blocks
    if case.pattern == "block" and whole and num_tokens % case.block == 0 and num_tokens >= 256:
        from torch.sparse._triton_ops import bsr_dense_addmm

        bsr = weight.to_sparse_bsr((case.block, case.block))
        zero = torch.zeros(case.shape[0], num_tokens, dtype=weight.dtype, device=weight.device)

        def product(x: Tensor, **meta: int) -> Tensor:
            return bsr_dense_addmm(zero, bsr, x.T, beta=0, meta=meta or None).T

        yield "torch BSR", product
        for tile, stages, warps in ((64, 3, 4), (64, 5, 4), (128, 3, 4), (128, 5, 4), (128, 4, 8)):
            if num_tokens % tile == 0:
                meta = {"SPLIT_N": num_tokens // tile, "GROUP_SIZE_ROW": 4, "num_stages": stages, "num_warps": warps}
                yield f"torch BSR {meta}", functools.partial(product, **meta)


def run_grid(cases: Sequence[Case], device: torch.device, echo: Callable[[str], None]) -> list[dict[str, Any]]:
    """All records, each echoed as one line when it is there: bf16 on a GPU; on a CPU bf16 blocks and fp32 weights, with as
    many threads as torch uses."""
    records = []
    warnings.filterwarnings("ignore", message=".*semi.structured.*")
    for case in cases:
        for record in run_case(case, device):
            records.append(record)
            best = "no backend" if record["ratio"] is None else f"{record['best']} {record['ratio']:.2f}x"
            peers = ", ".join(f"{name.partition('{')[0].strip()} {record['dense_us'] / us:.2f}x"
                              for name, us in sorted(record["peers_us"].items(), key=lambda item: item[1])[:1])
            pattern = case.pattern if case.block == 1 else f"{case.pattern} {case.block}"
            echo(f"{case.shape[0]} x {case.shape[1]}, {pattern}, {case.sparsity:.0%}, {record['num_tokens']} tokens: dense "
                 f"{record['dense_us']:.1f} us, {best}, dispatched {record['dispatched']} {record['dispatched_ratio']:.2f}x"
                 + (f"; {peers}" if peers else ""))
    return records
