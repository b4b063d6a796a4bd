import socket

import pytest

from raysearch.training.hardware import can_compile, device_type, free_port, memory_bytes


def test_a_cpu_is_taken_where_it_is_asked_for_and_has_half_of_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (device_type(), can_compile()) == ("cpu", False)
    with open("/proc/meminfo") as file:
        total_kib = int(next(line.split()[1] for line in file if line.startswith("MemTotal")))
    assert memory_bytes() == pytest.approx(512 * total_kib, rel=0.01)


def test_nothing_is_compiled_without_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.training.hardware.device_type", lambda: "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert not can_compile()


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as listener:
        listener.bind(("", free_port()))
