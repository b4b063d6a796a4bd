"""What is missing or unsafe on this machine and its Ray cluster, one sentence each, with the way out."""

import contextlib
import importlib.metadata
import ipaddress
import os
import platform
import shutil
import socket
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import ray
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysearch.study.files import new_file
from raysearch.study.storage import AnyPath, StorePath, location
from raysearch.study.text import first_line

PACKAGE = "raysearch-llm"
MIN_SHARED_MEMORY_BYTES = 2 * 10**9
"""Docker gives a container 64 MB unless it is asked for more."""
MIN_FREE_BYTES = 10**9
"""Below it, free disk is a problem; below FEW_FREE_BYTES, a warning."""
FEW_FREE_BYTES = 20 * 10**9
TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 60.0
"""A node may first have to start a worker process."""


@dataclass(frozen=True)
class Check:
    level: Literal["ok", "warning", "problem"]
    text: str


def examine(directory: str | AnyPath) -> list[Check]:
    """All checks; `directory` is where studies will be written. A probe file is written there and deleted."""
    target = location(directory)
    folder = target if isinstance(target, StorePath) else next(path for path in (target, *target.parents) if path.exists())
    return [*check_versions(), check_compiler(), *check_gpus(), check_shared_memory(Path("/dev/shm")),
            check_store(folder) if isinstance(folder, StorePath) else check_disk(folder),
            *check_token_file(Path.home() / ".ray" / "auth_token"), *check_cluster(folder)]


# ---- this machine ----


def check_versions() -> Iterator[Check]:
    """Installed versions against the ranges of pyproject.toml."""
    try:
        wanted = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        yield Check("problem", f"{PACKAGE} is not installed in this Python, so no version was checked; pip install it")
        return
    fitting = []
    if platform.python_version() not in SpecifierSet(wanted["Requires-Python"]):
        yield Check("problem", f"python {platform.python_version()} must be {wanted['Requires-Python']}")
    for requirement in map(Requirement, wanted.get_all("Requires-Dist") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check("problem", f"{requirement.name} is missing; pip install '{requirement}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):  # a nightly build is one
            fitting.append(f"{requirement.name} {version}")
        else:
            yield Check("problem", f"{requirement.name} {version} must be {requirement.specifier}; pip install '{requirement}'")
    yield Check("ok", f"python {platform.python_version()}, {', '.join(fitting)}")


def check_compiler() -> Check:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler:
        return Check("ok", f"C compiler {compiler}")
    return Check("warning", "no C compiler: sweeps run, but Triton cannot build its kernels on a GPU; install gcc")


def check_gpus() -> Iterator[Check]:
    if not torch.cuda.is_available():
        yield Check("warning", "no GPU here that torch can use, so only small models are fast on this machine; check "
                               "nvidia-smi, and that torch is a CUDA build")
    for index in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        text = f"GPU {index}: {torch.cuda.get_device_name(index)}, {_gb(free_bytes)} of {_gb(total_bytes)} free"
        busy = free_bytes < 0.9 * total_bytes  # asking takes memory too, but far less than a tenth
        yield Check("warning", f"{text}: something else uses it; see nvidia-smi") if busy else Check("ok", text)


def check_shared_memory(folder: Path) -> Check:
    if not folder.is_dir():
        return Check("warning", f"{folder} does not exist: Ray keeps its object store on disk, which is slow")
    total_bytes = shutil.disk_usage(folder).total
    if total_bytes < MIN_SHARED_MEMORY_BYTES:
        return Check("warning", f"{folder} has {_gb(total_bytes)}, and Ray keeps on disk what does not fit; start a "
                                "container with --shm-size=16g")
    return Check("ok", f"{folder} has {_gb(total_bytes)}")


def check_disk(folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check("problem", f"{folder} cannot be written ({error.strerror}); give another directory")
    free_bytes = shutil.disk_usage(folder).free
    level: Literal["ok", "warning", "problem"] = "problem" if free_bytes < MIN_FREE_BYTES else (
        "warning" if free_bytes < FEW_FREE_BYTES else "ok")
    way_out = "" if level == "ok" else "; `raysearch plan` says how much a sweep needs"
    return Check(level, f"{folder} can be written, {_gb(free_bytes)} are free{way_out}")


def check_store(folder: StorePath) -> Check:
    try:
        with probe(folder) as path:
            text = path.read_text()
    except OSError as error:
        return Check("problem", f"{folder} cannot be written: {error.strerror}")
    if text != str(path):
        return Check("problem", f"{folder} does not give back what was just written to it; give a store that does")
    return Check("ok", f"{folder} can be written, read and deleted")


@contextlib.contextmanager
def probe(folder: AnyPath) -> Iterator[AnyPath]:
    """A fresh file that holds its own name."""
    path = folder / f".raysearch-doctor-{uuid.uuid4().hex}"
    with new_file(path) as file:
        file.write_text(str(path))
    try:
        yield path
    finally:
        path.unlink()


def check_token_file(path: Path) -> Iterator[Check]:
    if path.is_file() and path.stat().st_mode & 0o077:
        yield Check("warning", f"{path}, Ray's token, can be read by other users, who may then run any code on the "
                               f"cluster; chmod 600 {path}")


# ---- the cluster ----


def cluster_address() -> str | None:
    """What `ray.init()` would join: RAY_ADDRESS, else the cluster that `ray start` noted on this machine."""
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return os.environ.get("RAY_ADDRESS") or (noted.read_text().strip() if noted.is_file() else None)


def check_cluster(folder: AnyPath) -> Iterator[Check]:
    address = cluster_address()
    if address is None:
        yield Check("ok", "no Ray cluster runs here: a sweep starts its own on this machine, without a dashboard")
        return
    if address.startswith("http"):
        yield check_dashboard(address)
        yield Check("warning", "RAY_ADDRESS names a dashboard, so the nodes were not asked; run doctor as a job: "
                               "ray job submit -- python -m raysearch doctor DIR")
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), TIMEOUT_S).close()
        context = ray.init(address, log_to_driver=False, logging_level="error")
    except ValueError:
        yield Check("problem", f"RAY_ADDRESS must be HOST:PORT, got {address}; unset it to start Ray on this machine")
        return
    except (OSError, ray.exceptions.RayError) as error:
        yield Check("problem", f"the cluster at {address} cannot be joined ({first_line(error)}); start it, unset RAY_ADDRESS, "
                               "or give this machine its token")
        return
    try:
        url = context.address_info.get("webui_url")
        yield check_dashboard(f"http://{url}") if url else Check("ok", "the cluster has no dashboard")
        yield from check_storage(folder)
    finally:
        ray.shutdown()


def check_dashboard(url: str) -> Check:
    """Ray's dashboard runs any code it is given (CVE-2023-48022): it must be on loopback, behind a token."""
    where = urlsplit(url)
    host, port = where.hostname or "", where.port or 80
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/version", timeout=TIMEOUT_S):
            token = False
    except urllib.error.HTTPError as error:
        token = error.code in (401, 403)
    except OSError as error:
        return Check("warning", f"the dashboard at {url} does not answer ({error}), so its token was not checked")
    loopback = host == "localhost" or _is_loopback(host)
    on_network = not loopback or listens_on_all_interfaces(port)
    fix = "start the head with --dashboard-host=127.0.0.1, and every node with RAY_AUTH_MODE=token"
    if on_network and not token:
        return Check("problem", f"whoever reaches the dashboard at {host}:{port} can run code on the cluster: it is "
                                f"bound to the network and asks for no token (CVE-2023-48022); {fix}")
    if on_network:
        return Check("warning", f"the dashboard at {host}:{port} is bound to the network, and only its token, sent in "
                                f"plain text, protects it (CVE-2023-48022); {fix}")
    if not token:
        return Check("warning", "token authentication is off: any user of this machine, and a page in a browser on it, "
                                f"can run code on the cluster (CVE-2023-48022); {fix}")
    return Check("ok", f"the dashboard at {host}:{port} is on loopback and asks for a token")


def listens_on_all_interfaces(port: int) -> bool:
    """Whether a process of this machine listens on 0.0.0.0 or [::] at `port` (Linux's /proc/net/tcp)."""
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.is_file() else ():
            _, local, _, state, *_ = line.split()
            address, _, hex_port = local.partition(":")
            if state == "0A" and int(hex_port, 16) == port and int(address, 16) == 0:  # 0A: it listens
                return True
    return False


def check_storage(folder: AnyPath) -> Iterator[Check]:
    """Reads a fresh file of `folder` on every node, where the same version of this package must be installed."""

    @ray.remote(num_cpus=0, max_retries=0)
    def look(path: str) -> tuple[str, str]:  # sent as code: the node may not have this package
        from importlib import metadata
        from pathlib import Path

        try:
            if "://" in path:
                from pyarrow.fs import FileSystem

                filesystem, inside = FileSystem.from_uri(path)
                with filesystem.open_input_stream(inside) as stream:
                    text = stream.read().decode()
            else:
                text = Path(path).read_text()
        except OSError as error:
            text = f"not there: {error.strerror}"
        try:
            return text, metadata.version("raysearch-llm")
        except metadata.PackageNotFoundError:
            return text, "not installed"

    nodes = [node for node in ray.nodes() if node["Alive"]]
    here = importlib.metadata.version(PACKAGE)
    blind, other = [], []
    with probe(folder) as path:
        looks = {look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
                 .remote(str(path)): node["NodeManagerHostname"] for node in nodes}
        for answer, name in looks.items():
            try:
                text, version = ray.get(answer, timeout=PROBE_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                yield Check("problem", f"node {name} did not run a task ({type(error).__name__}); see `ray logs`")
                continue
            blind += [name] if text != str(path) else []
            other += [f"{name}: {version}"] if version != here else []
    resources = ray.cluster_resources()
    size = f"{len(nodes)} nodes, {resources.get('GPU', 0):g} GPU, {resources.get('CPU', 0):g} CPU"
    if blind:
        way_out = ("give every node credentials and a way to it" if isinstance(folder, StorePath)
                   else "give a directory that every node mounts (NFS), or a URI such as s3://BUCKET/studies")
        yield Check("problem", f"{folder} is not the same storage on {', '.join(blind)}; {way_out}")
    else:
        yield Check("ok", f"{folder} is seen by all of the cluster's {size}")
    if other:
        yield Check("problem", f"{PACKAGE} is {here} here, but {', '.join(other)}; install one version everywhere")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
