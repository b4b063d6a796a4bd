"""An S3 server (moto's) in this process, an empty folder in it, and how to make it refuse."""

import os
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import raysearch.study.files
from raysearch.study.storage import AnyPath, StorePath, location

_SERVERS: dict[str, Any] = {}
SECRET = "planted0f3c9a77"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """HOST:PORT of an S3 server that holds "bucket", with credentials for it in the environment."""
    from moto.server import ThreadedMotoServer  # seconds, which only the tests that ask for a store should pay

    started = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    started.start()
    address = "{}:{}".format(*started.get_host_and_port())
    _SERVERS[address] = started._server
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_CONFIG_FILE": os.devnull,
                            "AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": os.devnull}.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)
        request(f"http://{address}/bucket", "PUT")
        yield address
    started.stop()


def request(url: str, method: str, data: bytes | None = None) -> None:
    urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "text/plain"}, method=method)).close()


@pytest.fixture
def refused_writes(s3: str) -> Iterator[list[str]]:
    """Methods that the server refuses while they are in the list; it still answers to all others."""
    methods: list[str] = []
    answer = _SERVERS[s3].app

    def application(environ: dict[str, Any], start: Callable[..., object]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in methods:
            return answer(environ, start)
        body = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        start("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    _SERVERS[s3].app = application
    yield methods
    _SERVERS[s3].app = answer


@pytest.fixture
def store(s3: str, tmp_path: Path) -> StorePath:
    """An empty one of its own in the store."""
    found = location(f"s3://bucket/{tmp_path.name}/x?endpoint_override={s3}&scheme=http")
    assert isinstance(found, StorePath)
    return found


@pytest.fixture
def refusing_store(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Call it: from now on, and for `seconds`, the server refuses this process's credentials."""
    monkeypatch.setattr(raysearch.study.files, "WRITE_RETRY_S", 0.5)

    def after(num_requests: str) -> None:
        request(f"http://{s3}/moto-api/reset-auth", "POST", num_requests.encode())

    timers: list[threading.Timer] = []

    def refuse(seconds: float) -> None:
        after("0")
        timers.append(threading.Timer(seconds, after, ("1e9",)))
        timers[-1].start()

    yield refuse
    for timer in timers:
        timer.cancel()
    after("1e9")


@pytest.fixture(params=["folder", "store"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> AnyPath:
    """A directory that does not exist yet, in a local folder and on a store: one contract holds for both."""
    return tmp_path / "x" if request.param == "folder" else request.getfixturevalue("store")
