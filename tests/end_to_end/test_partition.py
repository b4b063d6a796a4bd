"""A network that breaks: nodes in network namespaces of their own, each behind a real link that can be taken down."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from faults import inject, wait_until, workers
from sweeps import ROOT, finish, sweep, write_space
from test_faults import check, records
from test_nodes import NOTED_ROUNDS, begun

from raysearch.training.hardware import free_port

NUM_NODES = 3


def ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True)


class Network:
    """A bridge that stands for the network, a head without CPUs on it, and nodes of one CPU behind a link each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"rs{os.getpid()}"
        self.prefix = f"10.{os.getpid() % 200 + 20}.213"
        self.address = f"{self.prefix}.1:{free_port()}"
        self.processes: list[subprocess.Popen] = []
        """`ray start` of the head, then of the nodes."""

    def start(self) -> None:
        ip("link", "add", self.name, "type", "bridge")
        ip("addr", "add", f"{self.prefix}.1/24", "dev", self.name)
        ip("link", "set", self.name, "up")
        host, _, port = self.address.partition(":")
        self._ray([], "--head", f"--node-ip-address={host}", f"--port={port}", "--num-cpus=0", "--include-dashboard=false",
                  f"--temp-dir={self.folder}")
        self._wait_for(1)
        for node in range(NUM_NODES):
            space, address = f"{self.name}n{node}", f"{self.prefix}.{10 + node}"
            ip("netns", "add", space)
            ip("link", "add", f"{self.name}v{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", f"{self.name}v{node}", "master", self.name, "up")
            ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
            self._ray(["ip", "netns", "exec", space], f"--address={self.address}", f"--node-ip-address={address}",
                      "--num-cpus=1")
            self._wait_for(2 + node)  # two at once would take the same name for their socket

    def _ray(self, prefix: list[str], *options: str) -> None:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0"}
        command = [*prefix, Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats", *options]
        self.processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def _wait_for(self, num_nodes: int) -> None:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(Exception):  # Ray raises several kinds while nobody listens
                if len(ray._raylet.GcsClient(address=self.address).get_all_node_info(timeout=5)) == num_nodes:
                    return
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def home(self, name: str) -> int:
        """The node on which a process of this title runs."""
        (found,) = [node for node, process in enumerate(self.processes[1:]) if workers(process.pid, name)]
        return found

    def set_link(self, node: int, state: str) -> None:
        ip("link", "set", f"{self.name}v{node}", state)

    def stop(self) -> None:
        for process in self.processes:
            below = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            for child in below:
                with contextlib.suppress(psutil.Error):
                    child.kill()
        for node in range(NUM_NODES):
            subprocess.run(["ip", "netns", "del", f"{self.name}n{node}"], check=False, capture_output=True)
        ip("link", "del", self.name)


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2, for network namespaces")
    inject(tmp_path, NOTED_ROUNDS, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: it holds sockets
    started = Network(folder)
    try:
        started.start()
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_node_behind_a_broken_link_is_given_up_and_records_nothing_twice(tmp_path: Path, tiny_model: Path, stories: Path,
                                                                           network: Network) -> None:
    write_space(tmp_path, tiny_model, stories, num_trials=3, max_concurrent=1, num_ranks=2, zero_stage=2, cpus_per_rank=1.0)
    process = sweep(tmp_path, address=network.address)
    wait_until(lambda: begun(tmp_path), process)
    before, victim = records(tmp_path), network.home("ray::ResourceTrainable")
    network.set_link(victim, "down")
    broken, num_begun = time.monotonic(), len(begun(tmp_path))
    wait_until(lambda: len(begun(tmp_path)) > num_begun, process, limit_s=200)
    print(f"goes on {time.monotonic() - broken:.1f} s after the link broke")
    network.set_link(victim, "up")  # and whatever lives there comes back
    code, out, err = finish(process)
    assert code == 0, out + err
    check(tmp_path, 3, {1: "training loss became"})
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
