"""Joining the Ray cluster, and what auto makes of it."""

import os
import socket
from pathlib import Path

import psutil
import pytest

from raysearch.cluster.joining import gpu_memory, placed, use_rays_network
from raysearch.cluster.placement import Work
from raysearch.config import Study, study_of


def auto(**settings: object) -> Study:
    return study_of(**{"model": "m", "num_ranks": "auto", "zero_stage": "auto", "gpus_per_rank": 1.0, "dtype": "bfloat16",
                    "context_tokens": 1024, "batch_tokens": 16_384, **settings})


def test_on_processors_auto_is_one_rank_and_a_record_is_adopted() -> None:
    said: list[str] = []
    study = placed(auto(gpus_per_rank=0.0), None, Work(), said.append)
    assert (study.cluster.num_ranks, study.cluster.zero_stage, len(said)) == (1, 0, 1)
    again = placed(auto(), auto(num_ranks=4, zero_stage=3), Work(), said.append)
    assert (again.cluster.num_ranks, again.cluster.zero_stage, len(said)) == (4, 3, 1)
    assert placed(auto(num_ranks=2, zero_stage=1), auto(num_ranks=4, zero_stage=3), Work(), said.append).cluster.num_ranks == 2


def test_what_would_not_repay_compilation_is_not_compiled(tiny_model: Path) -> None:
    said: list[str] = []

    def compile_of(tokens: float, recorded: Study | None = None, **settings: object) -> object:
        study = study_of(path=str(tiny_model), gpus_per_rank=1.0, **settings)
        return placed(study, recorded, Work(tokens=tokens), said.append).cluster.compile

    assert compile_of(1e6) is False
    assert said == ["placement   training is not compiled, for the 1.0 M tokens that a gang trains on would not repay it; set "
                    "compile to true for more than is planned"]
    assert (compile_of(1e15), compile_of(1e6, compile=True), compile_of(1e15, compile=False)) == ("auto", True, False)
    assert compile_of(1e6, study_of(path=str(tiny_model))) == "auto"  # as it began
    assert len(said) == 1


def test_this_machine_has_a_gpu_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ValueError, match="auto needs a GPU to measure"):
        gpu_memory()


def test_gloo_takes_the_interface_of_rays_address(monkeypatch: pytest.MonkeyPatch) -> None:
    (name, address), *_ = [(name, each.address) for name, addresses in psutil.net_if_addrs().items() for each in addresses
                           if each.family == socket.AF_INET]
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "given")
    use_rays_network()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "given"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_rays_network()
    assert os.environ["GLOO_SOCKET_IFNAME"] == name
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "203.0.113.1")
    use_rays_network()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
