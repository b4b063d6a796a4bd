"""A cluster of several nodes on this machine, one raylet each: gangs across nodes, and a node that is killed."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from faults import inject, wait_until
from ray.cluster_utils import Cluster
from test_faults import SLOW_ROUNDS, check, records
from test_search import ROOT, finish, sweep, write_space


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs and three nodes of one CPU each; a gang of two ranks leaves one node free.

    Its files lie apart from /tmp/ray, where other processes would find it as this machine's latest cluster.
    """
    inject(tmp_path, SLOW_ROUNDS, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it holds sockets
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": folder})
    for _ in range(3):
        started.add_node(num_cpus=1)
    yield started
    ray.shutdown()
    started.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def node_of(cluster: Cluster, name: str) -> ray._private.node.Node | None:
    """The worker node on which a process of this title runs, if any does."""
    for node in cluster.worker_nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in raylet.children(recursive=True):
            try:
                if (process.cmdline() or [""])[0].startswith(name):
                    return node
            except psutil.Error:
                continue
    return None


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["ray::ResourceTrainable", "ray::Rank"])
def test_a_killed_node_of_a_gang_over_two_nodes(tmp_path: Path, tiny_model: Path, stories: Path, cluster: Cluster,
                                                victim: str) -> None:
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=1, num_ranks=2, zero_stage=2, cpus_per_rank=1.0)
    process = sweep(tmp_path, address=cluster.address)
    wait_until(lambda: len(records(tmp_path)) >= 2, process)
    before = records(tmp_path)
    rank_0, rank_1 = node_of(cluster, "ray::ResourceTrainable"), node_of(cluster, "ray::Rank")
    assert rank_0 is not None
    assert rank_1 is not None
    assert rank_0 is not rank_1
    started = time.monotonic()
    cluster.remove_node(rank_0 if victim == "ray::ResourceTrainable" else rank_1, allow_graceful=False)
    code, out, err = finish(process)
    assert code == 0, out + err
    print(f"finished {time.monotonic() - started:.1f} s after the node was killed")
    check(tmp_path, 3, {1: "training loss became"})
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
