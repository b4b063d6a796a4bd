"""One driver per study on a store: refused, given up, taken over."""

import json
import os
import signal
import subprocess
import sys

import pytest

from raysearch.study import lease
from raysearch.study.lease import holder
from raysearch.study.ledger import Ledger
from raysearch.study.storage import StorePath

HOLD = """
import sys, time
from raysearch.study import lease
from raysearch.study.storage import location
lease.RENEW_S = 0.2
with lease.lease(location(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: StorePath) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n", process.communicate()
    return process


def test_a_second_driver_is_refused_until_the_first_is_gone(store: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(store)
    first = hold(store / "lock")
    assert ledger.driver() == (True, f"process {first.pid} on {os.uname().nodename}")
    with pytest.raises(ValueError, match=rf"another driver runs this study \(process {first.pid} on .*, last seen \d+ s ago\)"):
        ledger.lock().__enter__()
    first.communicate()
    assert ledger.driver() == (False, "")
    second = hold(store / "lock")
    second.kill()
    second.communicate()
    assert ledger.driver() == (False, f"process {second.pid} on {os.uname().nodename}")
    with ledger.lock():  # its process is known to be dead, so nobody waits for STALE_S
        assert ledger.driver() == (True, f"process {os.getpid()} on {os.uname().nodename}")
    assert not (store / "lock").exists()


def test_a_lease_of_another_machine_is_given_up_when_it_is_old(store: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store / "lock"
    path.write_bytes(json.dumps({"process": 7, "host": "elsewhere", "process_table": "other", "began_at_s": 0.0}).encode())
    assert holder(path)[:2] == (True, "process 7 on elsewhere")
    with pytest.raises(ValueError, match="process 7 on elsewhere, last seen"), lease.lease(path):
        pass
    path.write_bytes(b"process 7 on a local study's lock")
    assert holder(path) == (False, "", 0.0)
    path.write_bytes(json.dumps({"process": 7, "host": "elsewhere", "process_table": "other", "began_at_s": 0.0}).encode())
    monkeypatch.setattr(lease, "STALE_S", -1.0)
    assert holder(path)[:2] == (False, "process 7 on elsewhere")
    with lease.lease(path):
        pass
    assert not path.exists()


def test_whoever_loses_the_lease_ends(store: StorePath) -> None:
    first = hold(store / "lock")
    (store / "lock").write_bytes(json.dumps({"process": 7, "host": "elsewhere", "process_table": "other"}).encode())
    assert first.wait(timeout=20) == -signal.SIGTERM
    assert "process 7 on elsewhere took this study over" in first.communicate()[1]
    assert json.loads((store / "lock").read_text())["host"] == "elsewhere"


def test_of_two_that_start_at_once_one_goes_on(store: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store / "lock"
    other = json.dumps({"process": 7, "host": "elsewhere", "process_table": "other"}).encode()
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: path.write_bytes(other))  # between our write and our second look
    with pytest.raises(ValueError, match="process 7 on elsewhere"), lease.lease(path):
        pass
    assert path.read_bytes() == other
