"""CUDA graphs of the scoring forward: one per batch shape, captured where launching kernels costs more than running them.

The rule, measured and not guessed: the first batch of a shape runs eagerly between two events. At the second, if those
say that the GPU was done as soon as the host was, the host is what is waited for and the forward is captured; if the
GPU took longer or still runs, a graph would save nothing (large models, large batches). A shape that comes once is
never captured. A sweep scores the same items after every round, so from the second round on all shapes are known.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raysearch.study.collector import without_collector

MAX_GRAPHS = 64
"""They share one pool of intermediate memory; each keeps its inputs and its output, which is why there is a limit."""
HOST_BOUND = 0.8
"""Host seconds over GPU seconds of an eager forward above which it is captured; a host-bound one is near 1, because the
GPU's time then holds its waits."""


@dataclass(frozen=True)
class _Timed:
    """An eager forward: what launching it took the host, and events around it on the GPU."""

    host_ms: float
    start: Any
    end: Any

    def is_host_bound(self) -> bool:
        return bool(self.end.query()) and self.host_ms > HOST_BOUND * self.start.elapsed_time(self.end)


@dataclass(frozen=True)
class _Captured:
    graph: Any
    inputs: list[Tensor]
    output: Tensor

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for static, new in zip(self.inputs, inputs):
            static.copy_(new)
        self.graph.replay()
        return self.output


class Graphs:
    """Calls forward(is_chain, *inputs), by a graph where one pays. The output is valid until the next call."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward
        self._seen: dict[tuple[Any, ...], _Timed | _Captured] = {}
        self._weights: list[int] = []
        self._pool: Any = None

    @property
    def num_captured(self) -> int:
        return sum(isinstance(seen, _Captured) for seen in self._seen.values())

    def check(self, model: nn.Module) -> None:
        """Drops all graphs when the model's modules or the places of its tensors are no longer those that they read;
        values that change in place are seen by the next replay."""
        weights = [id(module) for module in model.modules()]
        weights += [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
        if weights != self._weights:
            self.clear()
            self._weights = weights

    def clear(self) -> None:
        self._seen.clear()
        self._pool = None

    def __call__(self, is_chain: bool, *inputs: Tensor) -> Tensor:
        key = (is_chain, *(tensor.shape for tensor in inputs))
        seen = self._seen.get(key)
        if isinstance(seen, _Timed) and self.num_captured < MAX_GRAPHS and seen.is_host_bound():
            seen = self._seen[key] = self._capture(is_chain, inputs)
        if isinstance(seen, _Captured):
            return seen.replay(inputs)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        host_start = time.perf_counter()
        output = self.forward(is_chain, *inputs)
        end.record()
        self._seen[key] = _Timed((time.perf_counter() - host_start) * 1e3, start, end)
        return output

    def _capture(self, is_chain: bool, inputs: tuple[Tensor, ...]) -> _Captured:
        """As torch.cuda.graph does, without its wait for the GPU and its emptying of the cache."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        static = [tensor.clone() for tensor in inputs]
        graph, current, aside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        # graphs of an earlier scorer that the garbage collector destroyed meanwhile would break the capture
        with torch.cuda.stream(aside), without_collector():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = self.forward(is_chain, *static)
            except BaseException:  # such as out of memory; what the broken capture says of itself tells nothing
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(aside)
        return _Captured(graph, static, output)


def bucket(num: int) -> int:
    """`num` rounded up to one of eight sizes per power of two: at most an eighth more, and shapes that come again."""
    step = 1 << max(0, num.bit_length() - 4)
    return -(-num // step) * step
