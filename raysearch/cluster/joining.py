"""Joining the Ray cluster, and what fits it."""

import os
import signal
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import ray
import torch
from ray.job_config import JobConfig

import raysearch
from raysearch.cluster.placement import place
from raysearch.config import Study
from raysearch.models.model import model_size


def placed(study: Study, recorded: Study | None, echo: Callable[[str], None]) -> Study:
    """The study with `auto` ranks and stage decided: as in its record, where it has one, else by what fits the GPUs."""
    auto = [name for name in ("num_ranks", "zero_stage") if getattr(study.cluster, name) == "auto"]
    if not auto:
        return study
    if recorded is not None:
        chosen = {name: getattr(recorded.cluster, name) for name in auto}
    elif not study.cluster.gpus_per_rank:
        chosen = {name: {"num_ranks": 1, "zero_stage": 0}[name] for name in auto}
        echo("placement   on processors auto is one rank at ZeRO-0")
    else:
        placement = place(study, model_size(study.model.path), *gpu_memory())
        chosen = {name: getattr(placement, name) for name in auto}
        echo("placement   " + placement.arithmetic.replace("\n", "\n          "))
    return study.replaced(**chosen)


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
    home = str(Path(raysearch.__path__[0]).parent)
    # or the workers would look into the current folder first, where a file of the user may be named like a module of ours
    job = JobConfig(_client_job=True, _py_driver_sys_path=[home] * (home not in sysconfig.get_paths().values()))
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", configure_logging=True,
                 job_config=None if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else job)
    except RuntimeError as error:  # the versions of Ray or Python differ, and the rest of the message says how
        raise ValueError(f"the Ray cluster that runs here cannot be joined: {error}; use its Python, or unset RAY_ADDRESS "
                         "and stop it") from error
    if on_sigterm != signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has set its own


def start_ray(study: Study, autoscaling: bool = False) -> None:
    """Connects, and checks that one gang fits into the cluster, unless that adds nodes by itself."""
    connect_ray()
    if not autoscaling and (short := shortage(study)):
        raise ValueError(f"{short}; lower num_ranks, add nodes, or give --autoscaling where the cluster adds them when they "
                         "are needed")


def shortage(study: Study) -> str:
    """What one gang needs and the cluster has not; "" where it fits."""
    needs = {"CPU": study.cluster.cpus_per_rank} | ({"GPU": study.cluster.gpus_per_rank} if study.cluster.gpus_per_rank else {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # rank by rank: the sum of the cluster's CPUs says nothing about one; and 0.3 / 0.1 is 2.9999999999999996
    num_fitting = sum(min(int(node.get(name, 0) / need + 1e-9) for name, need in needs.items()) for node in nodes)
    if num_fitting >= study.cluster.num_ranks:
        return ""
    each = " and ".join(f"{need:g} {name}" for name, need in needs.items())
    have = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in needs)
    return (f"one trial needs {study.cluster.num_ranks} ranks of {each}, each rank on one node, but the cluster's "
            f"{len(nodes)} nodes ({have} in all) have room for {num_fitting}")


def use_rays_network() -> None:
    """Gloo takes the interface that has Ray's address of this node, unless GLOO_SOCKET_IFNAME names another; else it takes what
    the host's name resolves to, which may be 127.0.0.1. Call it before the process group is made."""
    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
