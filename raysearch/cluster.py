"""The Ray cluster that a sweep runs on: joining it, what fits it, and how it ends."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError

from raysearch.config import Study
from raysearch.model import model_size
from raysearch.placement import place


def placed(study: Study, recorded: Study | None, echo: Callable[[str], None]) -> Study:
    """The study with `auto` ranks and stage decided: as in its record, where it has one, else by what fits the GPUs."""
    auto = [name for name in ("num_ranks", "zero_stage") if getattr(study, name) == "auto"]
    if not auto:
        return study
    if recorded is not None:
        chosen = {name: getattr(recorded, name) for name in auto}
    elif not study.gpus_per_rank:
        chosen = {name: {"num_ranks": 1, "zero_stage": 0}[name] for name in auto}
        echo("placement   on processors auto is one rank at ZeRO-0")
    else:
        placement = place(study, model_size(study.model), *gpu_memory())
        chosen = {name: getattr(placement, name) for name in auto}
        echo("placement   " + placement.arithmetic.replace("\n", "\n          "))
    return study.model_copy(update=chosen)


def gpu_memory() -> tuple[int, int]:
    """(bytes of one GPU, number of GPUs): of the cluster of RAY_ADDRESS, else of this machine."""
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS") or not torch.cuda.is_available():
        connect_ray()
    if not ray.is_initialized():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.device_count()
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    if not num_gpus:
        raise ValueError("num_ranks and zero_stage: auto needs a GPU to measure while gpus_per_rank is above 0, and there is "
                         "none; give both as numbers, or gpus_per_rank 0")
    measure = ray.remote(num_gpus=1, num_cpus=0)(lambda: torch.cuda.get_device_properties(0).total_memory)
    return ray.get(measure.remote()), num_gpus


def connect_ray() -> None:
    """Connects to the cluster of RAY_ADDRESS, or that `ray start` noted here, or starts a local one."""
    if ray.is_initialized():
        return
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", configure_logging=True)
    except RuntimeError as error:  # the versions of Ray or Python differ, and the rest of the message says how
        raise ValueError(f"the Ray cluster that runs here cannot be joined: {error}; use its Python, or unset RAY_ADDRESS "
                         "and stop it") from error


def start_ray(study: Study, autoscaling: bool = False) -> None:
    """Connects, and checks that one gang fits into the cluster, unless that adds nodes by itself."""
    connect_ray()
    if autoscaling:
        return
    needs = {"CPU": study.cpus_per_rank} | ({"GPU": study.gpus_per_rank} if study.gpus_per_rank else {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_fitting = sum(min(int(node.get(name, 0) / need + 1e-9) for name, need in needs.items()) for node in nodes)
    if num_fitting < study.num_ranks:
        each = " and ".join(f"{need:g} {name}" for name, need in needs.items())
        have = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in needs)
        raise ValueError(f"one trial needs {study.num_ranks} ranks of {each}, each rank on one node, but the cluster's "
                         f"{len(nodes)} nodes ({have} in all) have room for {num_fitting}; lower num_ranks, add nodes, or "
                         "give --autoscaling where the cluster adds them when they are needed")


@contextlib.contextmanager
def out_of_memory_as_death() -> Iterator[None]:
    """In the block a process that Ray's memory monitor ends counts like one that died. Tune (2.60) knows RayActorError and
    RayTaskError only, and OutOfMemoryError, which is neither, would end the whole search."""
    original = RayActorManager._actor_task_failed

    def task_failed(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        is_out_of_memory = isinstance(exception, OutOfMemoryError)
        original(manager, tracked_actor_task, RayActorError(error_msg=str(exception)) if is_out_of_memory else exception)

    RayActorManager._actor_task_failed = task_failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = original


EXIT_WITHIN_S = 2.0
"""`ray job stop` kills 3 s after its SIGTERM."""


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) and Ctrl-C KeyboardInterrupt in the block; the process ends within EXIT_WITHIN_S,
    and at once on a second signal: nothing needs to be saved. Enter it after `ray.init`, which sets its own handler."""

    def end(code: int) -> None:  # as the first thing at exit: the interpreter's own end takes seconds and stops the clock
        ray.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def stop(number: int, frame: object) -> None:
        code = 128 + number
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))
        limit = threading.Timer(EXIT_WITHIN_S, os._exit, (code,))
        limit.daemon = True
        limit.start()
        atexit.register(end, code)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(code)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
