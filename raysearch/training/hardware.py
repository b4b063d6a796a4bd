"""What a rank of training runs on: its device, that device's memory, a compiler, and the ranks beside it."""

import atexit
import importlib.util
import os
import shutil
import socket
from datetime import timedelta

import torch
import torch.distributed as dist


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
