"""A cluster of several nodes on this machine, one raylet each: gangs across nodes; nodes that are killed or drained."""

import contextlib
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
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from sweeps import ROOT, finish, sweep, write_space
from test_faults import check, records

from raysearch.study.ledger import Ledger

NOTED_ROUNDS = """
import os, time
train = round.train_candidate
def slow(worker, parent, action):
    if worker.engine.rank == 0:
        with open(os.environ["FAULT"] + ".rounds", "a") as file:
            file.write(action.model_dump_json() + os.linesep)
    time.sleep(1.5)
    return train(worker, parent, action)
round.train_candidate = slow
"""


def begun(folder: Path) -> list[str]:
    """Actions of the rounds that were begun so far, in order, one more time for each time."""
    path = folder / "fault.py.rounds"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs and three nodes of one CPU each; a gang of two ranks leaves one node free.

    Nothing of it lies in /tmp/ray, where other processes would find it as this machine's latest cluster.
    """
    monkeypatch.setattr(ray._private.utils, "write_ray_address", lambda address: None)
    inject(tmp_path, NOTED_ROUNDS, monkeypatch)
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


def homes(cluster: Cluster, name: str) -> dict[int, ray._private.node.Node]:
    """The worker node of each process of this title, by the process's id."""
    found = {}
    for node in cluster.worker_nodes:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if (process.cmdline() or [""])[0].startswith(name):
                        found[process.pid] = node
    return found


def wait_until_returned(cluster: Cluster) -> None:
    """Until every resource of the cluster is free again, which may take 10 s."""
    deadline = time.monotonic() + 10
    while (free := cluster.global_state.available_resources()).get("CPU") != cluster.global_state.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, free
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["ray::ResourceTrainable", "ray::Rank"])
def test_a_killed_node_of_a_gang_over_two_nodes(tmp_path: Path, tiny_model: Path, stories: Path, cluster: Cluster,
                                                victim: str) -> None:
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=1, num_ranks=2, zero_stage=2, cpus_per_rank=1.0)
    process = sweep(tmp_path, address=cluster.address)
    wait_until(lambda: len(records(tmp_path)) >= 2, process)
    before = records(tmp_path)
    (rank_0,), (rank_1,) = homes(cluster, "ray::ResourceTrainable").values(), homes(cluster, "ray::Rank").values()
    assert rank_0 is not rank_1
    started = time.monotonic()
    cluster.remove_node(rank_0 if victim == "ray::ResourceTrainable" else rank_1, allow_graceful=False)
    code, out, err = finish(process)
    wait_until_returned(cluster)
    assert code == 0, out + err
    print(f"finished {time.monotonic() - started:.1f} s after the node was killed")
    check(tmp_path, 3, {1: "training loss became"})
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def drain(cluster: Cluster, node: ray._private.node.Node) -> None:
    """What a cloud's notice of two minutes becomes: `ray drain-node`, without the seconds that its start takes."""
    accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(
        node.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", int((time.time() + 120) * 1000))
    assert accepted, why


@pytest.mark.slow
def test_a_drained_node_is_left_after_the_round_without_a_charge(tmp_path: Path, tiny_model: Path, stories: Path,
                                                                 cluster: Cluster) -> None:
    """Two notices for one trial, which may die once: with a charge for each it would fail."""
    write_space(tmp_path, tiny_model, stories, num_trials=2, max_concurrent=1, num_ranks=2, zero_stage=2, cpus_per_rank=1.0)
    process = sweep(tmp_path, address=cluster.address)
    wait_until(lambda: begun(tmp_path), process)
    first = homes(cluster, "ray::ResourceTrainable")
    drain(cluster, *homes(cluster, "ray::Rank").values())
    told = time.monotonic()
    cluster.add_node(num_cpus=1)
    wait_until(lambda: homes(cluster, "ray::ResourceTrainable").keys() - first.keys(), process)
    assert len(records(tmp_path)) == 2  # the dense baseline and the round that was running
    print(f"second gang {time.monotonic() - told:.1f} s after the first notice")
    drain(cluster, *homes(cluster, "ray::ResourceTrainable").values())
    code, out, err = finish(process)
    wait_until_returned(cluster)
    assert code == 0, out + err
    check(tmp_path, 2, {1: "training loss became"})
    assert len(begun(tmp_path)) == len(set(begun(tmp_path))) == 3


@pytest.mark.slow
def test_a_trial_waits_for_the_nodes_that_an_autoscaler_adds(tmp_path: Path, tiny_model: Path, stories: Path,
                                                             cluster: Cluster) -> None:
    write_space(tmp_path, tiny_model, stories, num_trials=1, cpus_per_rank=2.0)
    code, _, err = finish(sweep(tmp_path, address=cluster.address))
    assert code == 2
    assert "one trial needs 1 ranks of 2 CPU, each rank on one node, but the cluster's 4 nodes (3 CPU in all) have room" in err
    process = sweep(tmp_path, "--autoscaling", address=cluster.address)
    wait_until((tmp_path / "study" / "tune").is_dir, process)
    time.sleep(2)
    assert process.poll() is None
    cluster.add_node(num_cpus=2)
    code, out, err = finish(process)
    assert code == 0, out + err
    check(tmp_path, 1, {})


@pytest.mark.slow
def test_lost_nodes_without_which_no_gang_fits_are_waited_for_and_then_given_up(
        tmp_path: Path, tiny_model: Path, stories: Path, cluster: Cluster) -> None:
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=1, num_ranks=2, zero_stage=2, cpus_per_rank=1.0)
    cluster.remove_node(next(iter(cluster.worker_nodes)))  # none is left over
    space = tmp_path / "space.py"
    space.write_text(space.read_text().replace('"round_limit_s"', '"wait_for_nodes_s": 20.0, "round_limit_s"'))
    process = sweep(tmp_path, address=cluster.address)
    wait_until(lambda: len(records(tmp_path)) >= 2, process, limit_s=200)
    (node,) = homes(cluster, "ray::Rank").values()
    cluster.remove_node(node, allow_graceful=False)
    code, out, err = finish(process)
    room = "one trial needs 2 ranks of 1 CPU, each rank on one node, but the cluster's 2 nodes (1 CPU in all) have room for 1"
    assert f"waiting for nodes, at most 20 s: {room}" in out
    given_up = f"no trial could run for 20 s: {room}; add nodes, or lower num_ranks, and the same command goes on"
    assert err == f"raysearch: {given_up}\n"
    assert code == 2
    assert [trial.status for trial in Ledger.open(tmp_path / "study").trials()] == ["running"]
    cluster.add_node(num_cpus=1)
    code, out, err = finish(sweep(tmp_path, address=cluster.address))
    assert code == 0, out + err
    check(tmp_path, 3, {1: "training loss became"})
