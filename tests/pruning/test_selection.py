"""Exact selection against brute force, on 1 to 4 ranks that are threads, and on 2 real gloo processes."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raysearch.kernels import selection_passes
from raysearch.pruning.budgets import num_to_prune
from raysearch.pruning.selection import (
    MAGNITUDES,
    SCORES,
    Passes,
    group_masks,
    keep_masks,
    refuse_nan,
    reserved,
    row_masks,
    threshold_masks,
)

torch.set_num_threads(1)


def on_ranks(world_size: int, work: Callable[[int, Callable[[Tensor], Tensor]], object]) -> list[object]:
    """work(rank, all_reduce) on `world_size` threads."""
    barrier = threading.Barrier(world_size, timeout=20)
    slots: list[Tensor] = [torch.empty(0)] * world_size

    def run(rank: int) -> object:
        def all_reduce(tensor: Tensor) -> Tensor:
            slots[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        return work(rank, all_reduce)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def brute_force_masks(parameters: list[Tensor], num_prune: int, passes: Passes = MAGNITUDES) -> list[Tensor]:
    """Stable argsort of all scores joined: ties in (parameter, flat index) order."""
    scores = torch.cat([p.flatten() for p in parameters]).float()
    scores = scores.abs() if passes is MAGNITUDES else scores + 0.0
    mask = torch.ones(len(scores), dtype=torch.bool)
    mask[scores.argsort(stable=True)[:num_prune]] = False
    return list(mask.split([p.numel() for p in parameters]))


def per_parameter_cut(parameter: Tensor, rank: int, world_size: int) -> tuple[int, int]:
    """ZeRO 3: every parameter is padded and cut in equal slices."""
    size = math.ceil(parameter.numel() / world_size)
    return min(rank * size, parameter.numel()), min((rank + 1) * size, parameter.numel())


def sharded_masks(parameters: list[Tensor], num_prune: int | dict[int, int], world_size: int, layout: str,
                  passes: Passes = MAGNITUDES) -> list[Tensor]:
    """keep_masks on every rank with its shards, joined back into whole parameters."""
    num_all = sum(p.numel() for p in parameters)
    starts = [sum(p.numel() for p in parameters[:i]) for i in range(len(parameters))]

    def bounds(index: int, rank: int) -> tuple[int, int]:
        if layout == "per_parameter":
            return per_parameter_cut(parameters[index], rank, world_size)
        size = math.ceil(num_all / world_size)  # ZeRO 1, 2: all parameters joined, then cut
        low, high = rank * size - starts[index], (rank + 1) * size - starts[index]
        return min(max(low, 0), parameters[index].numel()), min(max(high, 0), parameters[index].numel())

    def work(rank: int, all_reduce: Callable[[Tensor], Tensor]) -> object:
        cuts = [bounds(i, rank) for i in range(len(parameters))]
        indices = [i for i, (low, high) in enumerate(cuts) if high > low]
        shards = [parameters[i][slice(*cuts[i])] for i in indices]
        masks = keep_masks(shards, indices, num_prune, all_reduce=all_reduce, rank=rank, world_size=world_size,
                           passes=passes)
        return dict(zip(indices, masks, strict=True))

    by_rank = on_ranks(world_size, work)
    return [
        torch.cat([shard[i] for shard in by_rank if i in shard] or [torch.ones(0, dtype=torch.bool)])  # type: ignore[index, operator]
        for i in range(len(parameters))
    ]


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 3e-39, 1.0, -1.0, 1.0000001, 2.5, math.inf, -math.inf, 3.4028235e38]
values = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False))
parameter_lists = st.lists(st.lists(values, max_size=12), min_size=1, max_size=4)


@given(parameter_lists, st.floats(0, 1), st.integers(1, 4), st.sampled_from(["per_parameter", "joined"]),
       st.sampled_from([MAGNITUDES, SCORES]))
def test_masks_equal_brute_force_on_any_world_size(
    lists: list[list[float]], part: float, world_size: int, layout: str, passes: Passes
) -> None:
    parameters = [torch.tensor(p, dtype=torch.float32) for p in lists]
    num_prune = round(part * sum(p.numel() for p in parameters))
    expected = brute_force_masks(parameters, num_prune, passes)
    masks = sharded_masks(parameters, num_prune, world_size, layout, passes)
    assert all(torch.equal(mask, want) for mask, want in zip(masks, expected, strict=True))


@given(parameter_lists, st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(1, 4),
       st.sampled_from(["per_parameter", "joined"]), st.sampled_from([MAGNITUDES, SCORES]))
def test_parameters_that_are_compared_alone_are_as_if_there_were_no_others(
    lists: list[list[float]], parts: list[float], world_size: int, layout: str, passes: Passes
) -> None:
    parameters = [torch.tensor(p, dtype=torch.float32) for p in lists]
    num_prune = {index: round(part * p.numel()) for index, (p, part) in enumerate(zip(parameters, parts))}
    masks = sharded_masks(parameters, num_prune, world_size, layout, passes)
    for index, (parameter, mask) in enumerate(zip(parameters, masks, strict=True)):
        (expected,) = brute_force_masks([parameter], num_prune[index], passes)
        assert torch.equal(mask, expected)


@given(st.lists(values, min_size=1, max_size=30), st.data())
def test_what_is_reserved_goes_first_whatever_the_scores(scores: list[float], data: st.DataObject) -> None:
    eligible = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    num_prune = data.draw(st.integers(int((~eligible).sum()), len(scores)))
    given_scores = torch.tensor(scores, dtype=torch.float32)
    scored = reserved(given_scores, eligible)
    assert torch.equal(given_scores, torch.tensor(scores, dtype=torch.float32))  # what a criterion gathers goes on from there
    mask = keep_masks([scored], [0], num_prune, passes=SCORES)[0]
    assert not (mask & ~eligible).any()
    kept = torch.tensor(scores, dtype=torch.float32)[mask]
    pruned = torch.tensor(scores, dtype=torch.float32)[eligible & ~mask]
    assert int((~mask).sum()) == num_prune
    assert not len(kept) or not len(pruned) or kept.min() >= pruned.max()


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_scores_that_are_no_numbers_are_refused(nan: float) -> None:
    with pytest.raises(ValueError, match="scores must be numbers, got 1 NaN"):
        keep_masks([torch.tensor([1.0, nan, -math.inf])], [0], 1, passes=SCORES)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["per_parameter", "joined"])
def test_all_tied_weights_are_cut_in_order(world_size: int, layout: str) -> None:
    parameters = [torch.full((5,), -0.5), torch.full((7,), 0.5), torch.full((4,), 0.5)]
    for num_prune in range(17):
        mask = torch.cat(sharded_masks(parameters, num_prune, world_size, layout))
        assert mask.tolist() == [False] * num_prune + [True] * (16 - num_prune)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_over_several_chunks(dtype: torch.dtype) -> None:
    weights = (torch.randn(600_000, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)  # three chunks
    shards = list(weights.split([100_000, 0, 500_000]))
    for k in (1, 2, 299_999, 300_000, 600_000):
        masks = keep_masks(shards, [0, 1, 2], k)
        assert torch.equal(torch.cat(masks), torch.cat(brute_force_masks([weights], k)))


@pytest.mark.gpu
def test_masks_on_cuda_equal_masks_on_cpu() -> None:
    weights = (torch.randn(1 << 25, generator=torch.Generator().manual_seed(5)) * 0.02).bfloat16().float()
    shards = [weights[:1000], weights[1000:]]
    on_cpu = keep_masks(shards, [0, 1], 20_000_001)
    on_cuda = keep_masks([shard.cuda() for shard in shards], [0, 1], 20_000_001)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_cuda, on_cpu, strict=True))


@pytest.mark.gpu
def test_layers_on_cuda_are_cut_as_on_cpu() -> None:
    layers = [torch.randn(1000 * number, generator=torch.Generator().manual_seed(number)) for number in (1, 20, 300)]
    num_prune = {0: 500, 1: 0, 2: 299_000}
    for passes in (MAGNITUDES, SCORES):
        on_cpu = keep_masks(layers, range(3), num_prune, passes=passes)
        for on_device in (passes, selection_passes(passes, torch.device("cuda"))):
            on_cuda = keep_masks([layer.cuda() for layer in layers], range(3), num_prune, passes=on_device)
            assert all(torch.equal(one.cpu(), other) for one, other in zip(on_cuda, on_cpu, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("num_prune", [0, 250_000, 300_100, 700_000, 1_000_000])
def test_what_is_reserved_is_so_on_cuda(num_prune: int) -> None:
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(1_000_000, generator=generator).mul(64).round()  # ties
    scores[:100], scores[100:200] = -0.0, -math.inf
    eligible = torch.rand(1_000_000, generator=generator) < 0.7
    on_cpu, *on_cuda = (keep_masks([reserved(scores.to(device), eligible.to(device))], [0], num_prune, passes=passes)[0]
                        for device, passes in (("cpu", SCORES), ("cuda", SCORES),
                                               ("cuda", selection_passes(SCORES, torch.device("cuda")))))
    assert all(torch.equal(each.cpu(), on_cpu) for each in on_cuda)
    assert num_prune < 300_100 or not (on_cpu & ~eligible).any()


def test_nothing_to_prune_and_nothing_at_all() -> None:
    assert keep_masks([torch.tensor([3.0, 0.0])], [0], 0)[0].tolist() == [True, True]
    assert keep_masks([], [], 0) == []
    assert keep_masks([torch.ones(0)], [0], 0)[0].numel() == 0


def test_a_higher_sparsity_never_revives_a_pruned_weight() -> None:
    weights = torch.randn(5000, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    alive = torch.ones(5000, dtype=torch.bool)
    for sparsity in (0.1, 0.35, 0.6, 0.95):
        mask = keep_masks([weights], [0], num_to_prune(sparsity, 5000))[0]
        assert not (mask & ~alive).any()
        weights[~mask] = 0.0
        weights[mask] += 0.01 * torch.randn(int(mask.sum()), generator=torch.Generator().manual_seed(3))
        alive = mask


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, -1])  # quiet, signalling with a low payload, negative
@pytest.mark.parametrize("world_size", [1, 2])
def test_nan_is_refused_on_every_rank(bits: int, world_size: int) -> None:
    poisoned = torch.tensor([0, bits], dtype=torch.int32).view(torch.float32)

    def work(rank: int, all_reduce: Callable[[Tensor], Tensor]) -> object:
        shard = poisoned if rank == world_size - 1 else torch.ones(2)
        with pytest.raises(ValueError, match="scores must be numbers, got 1 NaN"):
            keep_masks([shard], [0], 1, all_reduce=all_reduce, rank=rank, world_size=world_size)
        return None

    on_ranks(world_size, work)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="must be between 0 and 3, got 4"):
        keep_masks([torch.ones(3)], [0], 4)
    with pytest.raises(ValueError, match="must be between 0 and 3, got -1"):
        keep_masks([torch.ones(3)], [0], -1)
    with pytest.raises(ValueError, match="1-D and contiguous"):
        keep_masks([torch.ones(3, 2)], [0], 1)
    with pytest.raises(ValueError, match="1-D and contiguous"):
        keep_masks([torch.ones(6)[::2]], [0], 1)
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        keep_masks([torch.ones(3, dtype=torch.float64)], [0], 1)
    with pytest.raises(ValueError, match="parameter_index"):
        keep_masks([torch.ones(3), torch.ones(3)], [1, 0], 1)


def test_threshold_masks_keep_what_reaches_the_threshold() -> None:
    third = torch.tensor([1 / 3]).item()  # the fp32 nearest to 1/3 is above it
    shard = torch.tensor([-0.5, 0.2, third, 0.0, math.inf, math.nan])
    assert threshold_masks([shard], [1 / 3])[0].tolist() == [True, False, True, False, True, True]
    assert threshold_masks([shard], [math.nextafter(third, 1)])[0].tolist() == [True, False, False, False, True, True]
    assert threshold_masks([shard], [0.0])[0].all()
    assert threshold_masks([shard], [1e39])[0].tolist() == [False, False, False, False, True, True]
    a, b = threshold_masks([shard[:2], shard[2:4]], [0.3, 0.1])
    assert (a.tolist(), b.tolist()) == ([True, False], [True, False])
    with pytest.raises(ValueError, match="threshold must be finite"):
        threshold_masks([shard], [math.nan])


@given(st.lists(st.lists(values, min_size=5, max_size=5), min_size=1, max_size=6), st.integers(0, 5))
def test_row_masks_equal_brute_force(rows: list[list[float]], num_prune: int) -> None:
    scores = torch.tensor(rows, dtype=torch.float32)
    expected = torch.stack([brute_force_masks([row], num_prune, SCORES)[0] for row in scores])
    assert torch.equal(row_masks(scores, num_prune), expected)


def test_row_masks_over_several_chunks_and_refusals() -> None:
    scores = torch.randn(700, 1000, generator=torch.Generator().manual_seed(4))
    assert (row_masks(scores, 300).sum(1) == 700).all()
    with pytest.raises(ValueError, match="per row must be 0 to 1000, got 1001"):
        row_masks(scores, 1001)


@given(st.integers(0, 1000), st.integers(0, 10**12))
def test_num_to_prune_is_exact(permille: int, num_weights: int) -> None:
    exact = Fraction(permille, 1000) * num_weights
    assert num_to_prune(permille / 1000, num_weights) == math.floor(exact + Fraction(1, 2))


def test_num_to_prune_where_floats_are_wrong() -> None:
    assert 0.29 * 50 < 14.5
    assert num_to_prune(0.29, 50) == 15
    assert num_to_prune(0.5, 3) == 2
    assert num_to_prune(0, 3) == 0
    with pytest.raises(ValueError, match="between 0 and 1, got nan"):
        num_to_prune(math.nan, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_shot_magnitude_on_gpt2_equals_the_plain_torch_reference(dtype: torch.dtype) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=48, n_layer=2, n_head=2))
    matrices = [
        p.detach().to(dtype).float().flatten() for n, p in model.named_parameters() if ".h." in n and p.dim() == 2
    ]
    assert len(matrices) == 8
    num_weights = sum(m.numel() for m in matrices)
    for sparsity in (0.1, 0.3, 0.5):
        num_prune = num_to_prune(sparsity, num_weights)
        expected = brute_force_masks(matrices, num_prune)
        for world_size in (1, 3):
            masks = sharded_masks(matrices, num_prune, world_size, "joined")
            assert all(torch.equal(mask, want) for mask, want in zip(masks, expected, strict=True))


def _gloo_rank(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

    def all_reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    parameters = [torch.arange(11) % 4 - 2.0, torch.ones(6)]
    shards = [p[slice(*per_parameter_cut(p, rank, 2))] for p in parameters]
    masks = keep_masks(shards, [0, 1], 7, all_reduce=all_reduce, rank=rank, world_size=2)
    torch.save(masks, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_gloo_processes_agree_with_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_gloo_rank, args=(str(tmp_path),), nprocs=2)
    masks = [torch.cat(shards) for shards in zip(*(torch.load(tmp_path / f"{r}.pt") for r in (0, 1)), strict=True)]
    expected = keep_masks([torch.arange(11) % 4 - 2.0, torch.ones(6)], [0, 1], 7)
    assert [m.tolist() for m in masks] == [m.tolist() for m in expected]
    assert sum(int((~m).sum()) for m in masks) == 7


@pytest.mark.parametrize(("num_kept", "size"), [(2, 4), (1, 4), (4, 8), (3, 5), (8, 16), (9, 20)])  # compared, and selected
@pytest.mark.parametrize("num_columns", [40, 39, 41, 3])
def test_groups_keep_exactly_n_of_m(num_kept: int, size: int, num_columns: int) -> None:
    """Against three nested loops; scores of both signs, many ties, some reserved at -inf."""
    scores = torch.randint(-2, 3, (6, num_columns), generator=torch.Generator().manual_seed(0)).float()
    scores[0] = 0.0
    scores[1, ::3] = -math.inf
    wanted = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(6):
        for start in range(0, num_columns, size):
            places = list(range(start, min(start + size, num_columns)))
            for place in sorted(places, key=lambda place: (scores[row, place].item(), place))[max(0, len(places) - num_kept):]:
                wanted[row, place] = True
    mask = group_masks(scores, num_kept, size)
    assert torch.equal(mask[2:], wanted[2:])
    assert torch.equal(mask & (scores > -math.inf), wanted & (scores > -math.inf))
    whole = num_columns // size * size
    assert (mask[:, :whole].reshape(-1, size).sum(1) == num_kept).all()


def test_nan_is_found_wherever_it_is() -> None:
    refuse_nan([])
    refuse_nan([torch.tensor(False)] * 3)
    with pytest.raises(ValueError, match="scores must be numbers, got NaN"):
        refuse_nan([torch.tensor(False), torch.tensor([1.0, math.nan]).isnan().any()])
