"""When a forward is captured; that a graph changes no number is tested on a GPU (test_gpu.py)."""

from dataclasses import dataclass

import pytest

from raysearch.evaluation.graphs import _Timed, bucket


@dataclass
class Event:
    """A torch.cuda.Event that the GPU has reached, or not yet."""

    at_ms: float
    reached: bool = True

    def query(self) -> bool:
        return self.reached

    def elapsed_time(self, end: "Event") -> float:
        assert end.reached
        return end.at_ms - self.at_ms


@pytest.mark.parametrize(("host_ms", "gpu_ms", "reached", "captured"), [
    (5.0, 5.1, True, True),  # the GPU waited for the host
    (5.0, 14.0, True, False),  # the host was ahead
    (5.0, 5.1, False, False),  # the GPU still works on batches before it
])
def test_a_forward_is_captured_where_the_gpu_waits_for_the_host(host_ms: float, gpu_ms: float, reached: bool,
                                                                captured: bool) -> None:
    assert _Timed(host_ms, Event(1.0), Event(1.0 + gpu_ms, reached)).is_host_bound() is captured


def test_buckets_are_few_and_at_most_an_eighth_larger() -> None:
    sizes = range(1, 40_000)
    assert all(num <= bucket(num) <= num * 1.125 for num in sizes)
    assert len({bucket(num) for num in sizes if num > 1000}) < 50
