"""Exact global selection and mask over weights that are sharded over ranks, against kthvalue and topk of one shard.

    python benchmarks/selection_gpu.py --num-ranks 2 --num-weights 1300000000          # NCCL, one GPU for each rank
    python benchmarks/selection_gpu.py --num-ranks 2 --num-weights 20000000 --device cpu

Each rank holds a contiguous part of every one of the layers, as ZeRO-3 does, in fp32. Timed on rank 0, between barriers,
after warm-up; the median of the repetitions. The same weights on one rank give the reference mask, which must be equal
bit for bit (where one rank cannot hold them, --no-check). Half the weights are rounded to bf16, as masters of a bf16
checkpoint are, so that there are ties; --zeros of them are pruned already. The floor is two reads of the shard at the
bandwidth of a device's sum. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from raysearch.kernels import selection_passes
from raysearch.kernels.device import device_name
from raysearch.pruning.budgets import num_to_prune
from raysearch.pruning.selection import MAGNITUDES, Passes, keep_masks
from raysearch.study.provenance import versions
from raysearch.training.hardware import free_port

NUM_LAYERS = 96
"""Weight matrices of a GPT of 24 layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description="exact selection over sharded weights")
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--num-weights", type=int, default=1_300_000_000)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--zeros", type=float, default=0.0, help="share of the weights that are pruned already")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--no-check", action="store_true")
    arguments = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    mp.spawn(run, (arguments,), nprocs=arguments.num_ranks)


def run(rank: int, arguments: argparse.Namespace) -> None:
    on_gpu = arguments.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=arguments.num_ranks)
    world_size = arguments.num_ranks
    length = arguments.num_weights // NUM_LAYERS // world_size
    parts = [[shard(layer, part, length, device, arguments.zeros) for layer in range(NUM_LAYERS)]
             for part in (range(world_size) if rank == 0 and not arguments.no_check else [rank])]
    shards = parts[rank if len(parts) > 1 else 0]
    num_weights = length * NUM_LAYERS * world_size
    num_prune = num_to_prune(arguments.sparsity, num_weights)
    index = list(range(NUM_LAYERS))

    def select(passes: Passes) -> list[Tensor]:
        return keep_masks(shards, index, num_prune, all_reduce=all_reduce, rank=rank, world_size=world_size, passes=passes)

    fastest = selection_passes(MAGNITUDES, device)
    masks = select(fastest)
    seconds = timed(lambda: select(fastest), device, arguments.repetitions)
    torch_only = timed(lambda: select(MAGNITUDES), device, 2)
    joined = [gathered(mask, world_size) for mask in masks] if not arguments.no_check else []
    if rank == 0:
        equal = None
        if not arguments.no_check:
            whole = keep_masks([torch.cat(column) for column in zip(*parts)], index, num_prune)
            equal = all(torch.equal(sharded, alone) for sharded, alone in zip(joined, whole))
            assert equal
            assert num_weights - sum(int(mask.sum()) for mask in whole) == num_prune
            parts = [shards]
            del whole, joined
        print(json.dumps({
            "benchmark": "selection_gpu", "num_weights": num_weights, "num_ranks": world_size,
            "sparsity": arguments.sparsity, "select_and_mask_ms": ms(seconds), "worst_ms": round(1000 * max(seconds), 3),
            "share_of_zeros": arguments.zeros, "torch_only_ms": ms(torch_only),
            "equal_to_one_rank": equal,
            **peers(shards, arguments.sparsity, device, arguments.repetitions),
            "date": date.today().isoformat(), "device": device_name(str(device)), **versions()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def shard(layer: int, part: int, length: int, device: torch.device, zeros: float) -> Tensor:
    """[length] fp32, this share of it zero; equal for equal (layer, part) on every rank."""
    generator = torch.Generator(device).manual_seed(1000 * layer + part)
    values = torch.randn(length, generator=generator, device=device).mul_(0.02)
    values[::2] = values[::2].bfloat16().float()
    values[torch.rand(length, generator=generator, device=device) < zeros] = 0
    return values


def all_reduce(counts: Tensor) -> Tensor:
    dist.all_reduce(counts)
    return counts


def gathered(mask: Tensor, world_size: int) -> Tensor:
    """The ranks' parts of one layer's mask, joined, on every rank."""
    parts = [torch.empty_like(mask, dtype=torch.uint8) for _ in range(world_size)]
    dist.all_gather(parts, mask.to(torch.uint8))
    return torch.cat(parts).bool()


def timed(work: Callable[[], Any], device: torch.device, repetitions: int, *, together: bool = True) -> list[float]:
    """Seconds of each repetition after two to warm up."""
    seconds = []
    for repetition in range(repetitions + 2):
        if together:
            dist.barrier()
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        if repetition >= 2:
            seconds.append(time.perf_counter() - started)
    return seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peers(shards: list[Tensor], sparsity: float, device: torch.device, repetitions: int) -> dict[str, float | int]:
    """torch's own selections on rank 0's shard alone, which need no communication and are a part of the work."""
    flat = torch.cat(shards)
    k = num_to_prune(sparsity, flat.numel())
    read = timed(lambda: [shard.sum() for shard in shards], device, repetitions, together=False)
    kth = timed(lambda: flat.abs() > flat.abs().kthvalue(k).values, device, 1, together=False)
    top = timed(lambda: torch.zeros_like(flat, dtype=torch.bool).scatter_(
        0, flat.abs().topk(flat.numel() - k, sorted=False).indices, True), device, 1, together=False)
    return {"shard_weights": flat.numel(), "floor_two_reads_ms": round(2 * ms(read), 3), "kthvalue_of_shard_ms": ms(kth),
            "topk_of_shard_ms": ms(top)}


def ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 3)


if __name__ == "__main__":
    main()
