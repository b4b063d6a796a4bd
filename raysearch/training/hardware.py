"""What a rank of training runs on: its device, that device's memory, a compiler, and the ranks beside it."""

import atexit
import contextlib
import importlib.util
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def device_type() -> str:
    """What this process trains on."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


def can_compile() -> bool:
    """Whether torch.compile works here and pays: on a GPU, with Triton and a C compiler for its launchers."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return (device_type() == "cuda" and importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers)))


def memory_bytes() -> float:
    """Of the device that this process trains on: of its GPU, or the half of the host's that others leave."""
    if device_type() == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """So many threads of torch's in this process meanwhile, on which bits depend; None: as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def join(timeout_s: float) -> torch.device:
    """Joins the ranks of the environment, or makes a world of one, which needs no port; this rank's device."""
    is_cuda = device_type() == "cuda"
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed asks for it
    device = torch.device("cuda", local_rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if is_cuda else "gloo", timeout=timedelta(seconds=timeout_s), **alone)
        if not is_cuda:  # a thread of gloo that outlives the interpreter ends the process with SIGABRT
            atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    return device


class Ranks:
    """The processes that train together: those of torch.distributed's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
    LOCAL_RANK), one where there is none. Collective: every rank calls the same methods in the same order."""

    def __init__(self, timeout_s: float) -> None:
        self.device = join(timeout_s)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def mean(self, value: Tensor) -> float:
        """Mean over the ranks of one number."""
        return float(self.sum_over_ranks(value.detach().float().to(self.device))) / self.world_size

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Of what each rank computed from sequences of its own; in place."""
        dist.all_reduce(tensor)
        return tensor

    def from_rank_0(self, compute: Callable[[], T]) -> T:
        """What `compute` returns on rank 0, on every rank; when it raises there, every rank raises."""
        if self.world_size == 1:
            return compute()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer = [compute(), None]
            except Exception as error:
                answer = [None, error]
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return cast(T, answer[0])

    def gather_objects(self, value: object) -> list[object]:
        """The ranks' values, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values
