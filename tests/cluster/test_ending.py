"""How a command ends: signals in processes of their own; Tune's actors when memory ran out, and on Ctrl-C."""

import signal
import subprocess
import sys
import time

import pytest
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.air.execution.resources.placement_group import PlacementGroupResourceManager
from ray.exceptions import OutOfMemoryError, RayActorError

from raysearch.cluster.ending import EXIT_WITHIN_S, ending_actors, stopping_on_signals

WAITS = """
import sys, time
from raysearch.cluster.ending import stopping_on_signals
try:
    with stopping_on_signals():
        print("waits", flush=True)
        time.sleep(60)
except BaseException as error:
    print(type(error).__name__, flush=True)
    if sys.argv[1] == "slow":
        time.sleep(60)
    raise
"""


@pytest.mark.parametrize(("number", "code", "raised"), [(signal.SIGTERM, 143, "SystemExit"),
                                                        (signal.SIGINT, 130, "KeyboardInterrupt")])
@pytest.mark.parametrize("pace", ["quick", "slow"])
def test_a_signal_ends_the_process_in_time(number: int, code: int, raised: str, pace: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS, pace], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waits\n"
    told = time.monotonic()
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, f"{raised}\n")
    assert time.monotonic() - told < EXIT_WITHIN_S + 1


def test_a_second_signal_ends_it_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS, "slow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "KeyboardInterrupt\n"
    told = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - told < EXIT_WITHIN_S / 2


def test_out_of_memory_counts_as_a_death_and_other_errors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Exception] = []
    monkeypatch.setattr(RayActorManager, "_actor_task_failed", lambda manager, task, exception: heard.append(exception))
    before = RayActorManager._actor_task_failed, RayActorManager.__init__
    other = ValueError("x")
    with pytest.raises(RuntimeError, match="boom"), ending_actors():
        for error in (OutOfMemoryError("no memory is left on the node"), other):
            RayActorManager._actor_task_failed(None, None, error)
        raise RuntimeError("boom")
    assert isinstance(heard[0], RayActorError)
    assert "no memory is left on the node" in str(heard[0])
    assert heard[1] is other
    assert (RayActorManager._actor_task_failed, RayActorManager.__init__) == before


def test_ctrl_c_ends_the_actors_of_tune_and_an_error_leaves_them_to_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[RayActorManager] = []
    monkeypatch.setattr(RayActorManager, "cleanup", lambda manager: cleaned.append(manager))
    for error, num_cleaned in ((KeyboardInterrupt, 1), (SystemExit, 2), (ValueError, 2)):
        with pytest.raises(error), ending_actors():
            manager = RayActorManager(PlacementGroupResourceManager())
            raise error
        assert len(cleaned) == num_cleaned
        assert (cleaned[-1] is manager) == (error is not ValueError)


def test_what_the_signals_did_before_is_back_after_a_command() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ValueError, match="x"), stopping_on_signals():
        assert signal.getsignal(signal.SIGINT) not in before
        raise ValueError("x")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
