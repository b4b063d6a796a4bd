"""`raysearch doctor`: each finding provoked. The cluster's own checks run in test_jobs.py, on a real head."""

import http.server
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import ray

from raysearch.cluster import doctor
from raysearch.cluster.doctor import (
    check_cluster,
    check_compiler,
    check_dashboard,
    check_disk,
    check_gpus,
    check_shared_memory,
    check_storage,
    check_token_file,
    check_versions,
)
from raysearch.study.storage import StorePath


@pytest.fixture
def dashboard(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a stand-in for Ray's dashboard, bound to `address`, that answers `status` without a token."""
    address, status = request.param

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((address, 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(("dashboard", "level", "text"), [
    (("0.0.0.0", 200), "problem", "asks for no token (CVE-2023-48022); start the head with --dashboard-host=127.0.0.1"),
    (("0.0.0.0", 401), "warning", "bound to the network, and only its token"),
    (("127.0.0.1", 200), "warning", "token authentication is off"),
    (("127.0.0.1", 401), "ok", "is on loopback and asks for a token"),
], indirect=["dashboard"])
def test_the_dashboards_binding_and_token(dashboard: int, level: str, text: str) -> None:
    check = check_dashboard(f"http://127.0.0.1:{dashboard}")
    assert (check.level, text in check.text) == (level, True), check


@pytest.mark.parametrize("dashboard", [("127.0.0.1", 200)], indirect=True)
def test_a_dashboard_that_does_not_answer_is_not_called_safe(dashboard: int) -> None:
    assert check_dashboard("http://127.0.0.1:1").level == "warning"


def test_versions_are_compared_with_the_packages_own_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "optuna" else installed(name))
    texts = [check.text for check in check_versions() if check.level == "problem"]
    assert any(text.startswith("optuna 1.0 must be ") and "pip install 'optuna" in text for text in texts)
    (fitting,) = [check.text for check in check_versions() if check.level == "ok"]
    assert f"ray {installed('ray')}" in fitting
    assert "optuna" not in fitting


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    assert any(check.text.startswith("deepspeed is missing; pip install 'deepspeed") for check in check_versions())


def test_no_compiler_and_no_gpu_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 0)
    assert check_compiler().level == "warning"
    assert [check.level for check in check_gpus()] == ["warning"]


def test_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist" in check_shared_memory(tmp_path / "shm").text
    assert check_disk(Path("/proc")).level == "problem"
    usage = type("Usage", (), {"total": 64_000_000, "free": 64_000_000})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert "--shm-size=16g" in check_shared_memory(tmp_path).text
    assert check_disk(tmp_path).level == "problem"
    assert not list(tmp_path.iterdir())


def test_a_token_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "auth_token"
    assert not list(check_token_file(path))
    path.write_text("secret")
    path.chmod(0o644)
    (check,) = check_token_file(path)
    assert (check.level, "secret" in check.text) == ("warning", False)
    path.chmod(0o600)
    assert not list(check_token_file(path))


@pytest.mark.parametrize(("address", "text"), [
    ("127.0.0.1:1", "cannot be joined"), ("nonsense", "RAY_ADDRESS must be HOST:PORT, got nonsense")])
def test_an_address_without_a_cluster(address: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    (check,) = check_cluster(tmp_path)
    assert (check.level, text in check.text) == ("problem", True), check


def test_no_address_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (check,) = check_cluster(tmp_path)
    assert check.level == "ok"


@pytest.mark.slow
def test_doctor_asks_every_node(store: StorePath) -> None:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        (check,) = check_storage(store)
    finally:
        ray.shutdown()
    assert (check.level, check.text) == ("ok", f"{store} is seen by all of the cluster's 1 nodes, 0 GPU, 1 CPU")
    assert list(store.iterdir()) == []
