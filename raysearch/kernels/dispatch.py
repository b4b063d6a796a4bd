"""Which backend a layer runs on: dense unless a sparse one has won on this GPU, this shape and this number of tokens.

Dense and the candidates are timed in turn, as CUDA graphs over buffers larger than the L2 cache, on the layer's own mask;
the fastest candidate then once more against dense alone. It wins when both times its median ratio to dense is 1.03 or more
and its lower quartile above 1. Decisions are kept on disk.
"""

import functools
import hashlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysearch.frozen import Frozen
from raysearch.kernels.backends import BACKENDS, Backend
from raysearch.kernels.device import device_name
from raysearch.kernels.weight import SparseWeight
from raysearch.study.files import default_cache_dir, write_json

WIN = 1.03
"""Least median ratio to dense."""
NUM_PAIRS = 15
L2_BYTES = 120e6
"""Sparse weights that a timing walks through, two L2 caches of an H200; at most MAX_COPIES of them."""
MAX_COPIES = 16
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Largest relative error, norm by norm, of a backend whose answer counts."""


class Choice(Frozen):
    """The decision for one layer and number of tokens."""

    backend: str
    """"dense", or a name of BACKENDS."""
    variant: Any = 0
    dense_us: float | None = None
    """None where nothing was timed."""
    sparse_us: float | None = None
    """Of the best candidate, also where it lost; None where there was none."""
    tuning_s: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times faster than dense the chosen backend is."""
        if self.backend == "dense" or self.dense_us is None or self.sparse_us is None:
            return 1.0
        return self.dense_us / self.sparse_us


def token_bucket(num_tokens: int) -> int:
    """The power of two that a number of tokens is decided at: the next one, and the nearest from 4096 on."""
    return 1 << (num_tokens - 1).bit_length() if num_tokens < 4096 else 1 << round(math.log2(num_tokens))


def best_backend(weight: SparseWeight, num_tokens: int, cache: Path | None = None) -> Choice:
    """The fastest way to multiply `num_tokens` tokens with this weight, on the device and in the dtype of its values.

    `cache`: the file of decisions; by default one in the cache directory. ValueError for less than 1 token.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    num_tokens = token_bucket(num_tokens)
    path = cache or default_cache_dir() / "kernels" / "decisions.json"
    known = _read(path)
    key = decision_key(weight, num_tokens)
    if key not in known:
        known = {**_read(path), key: decide(weight, num_tokens).model_dump()}
        write_json(path, known)
    choice = Choice.model_validate(known[key])
    return choice if not isinstance(choice.variant, list) else choice.model_copy(update={"variant": tuple(choice.variant)})


def decision_key(weight: SparseWeight, num_tokens: int) -> str:
    """What a decision depends on: device, versions, kernels, shape, tokens, dtype, pattern and density, whose buckets
    are 9 % wide: time goes with density, so one width in points would put 3 % and 7 % together."""
    bucket = round(8 * math.log2(weight.density)) if weight.density else "none"
    return " ".join([device_name(str(weight.values.device)), torch.__version__, kernels_hash(),
                     f"{weight.shape[0]}x{weight.shape[1]}", f"{num_tokens} tokens",
                     str(weight.values.dtype).removeprefix("torch."), f"{weight.pattern}/{weight.block}",
                     f"density 2^({bucket}/8)"])


@functools.cache
def kernels_hash() -> str:
    """First 8 hex digits of a hash of the kernels' sources: a changed kernel is timed again."""
    folder = Path(__file__).parent
    texts = [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".py", ".cu", ".cpp")]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:8]


Run = Callable[[Tensor], Tensor]
"""x [T, K] -> [T, O], with the weight inside."""


def decide(weight: SparseWeight, num_tokens: int) -> Choice:
    """Times dense and every variant of every backend that takes the weight."""
    started = time.perf_counter()
    layer = Copies(weight)
    x, dense = layer.inputs(num_tokens), layer.dense()
    reference = dense[0](x[0])
    candidates = [(name, variant, runs) for name, variant, runs in layer.candidates(num_tokens)
                  if _is_right(lambda runs=runs: runs[0](x[0]), reference, name, variant)]
    every = [dense, *(runs for *_, runs in candidates)]
    times = time_in_turn([layer.bound(runs, x) for runs in every], layer.device, NUM_PAIRS)
    dense_us, sparse_us, winner = statistics.median(times[0]), None, ("dense", 0)
    if candidates:
        sparse_us, best = min((statistics.median(column), index) for index, column in enumerate(times[1:]))
        name, variant, runs = candidates[best]
        # twice, the second time alone: without that the choice was slower than dense in 4 of 78 sparse cells, because several
        # candidates share the packed weight and find it in L2 (docs/kernels.md)
        if wins(times[0], times[1 + best]):
            again = time_in_turn([layer.bound(dense, x), layer.bound(runs, x)], layer.device, NUM_PAIRS)
            dense_us, sparse_us = statistics.median(again[0]), statistics.median(again[1])
            winner = (name, variant) if wins(*again) else winner
    return Choice(backend=winner[0], variant=winner[1], dense_us=dense_us / layer.num_copies,
                  sparse_us=None if sparse_us is None else sparse_us / layer.num_copies,
                  tuning_s=time.perf_counter() - started)


def wins(dense: Sequence[float], sparse: Sequence[float]) -> bool:
    """Whether these times, taken in turn, count as faster."""
    ratios = sorted(d / s for d, s in zip(dense, sparse))
    return statistics.median(ratios) >= WIN and ratios[len(ratios) // 4] > 1


class Copies:
    """One layer several times, so that a timing that walks through all copies does not find its weights in the L2 cache."""

    def __init__(self, weight: SparseWeight) -> None:
        self.weight, self.device, self.dtype = weight, weight.values.device, weight.values.dtype
        on_gpu = self.device.type == "cuda"
        self.num_copies = max(1, min(MAX_COPIES, math.ceil(L2_BYTES / weight.num_bytes))) if on_gpu else 1
        self._packed: dict[str, list[Any]] = {}

    def inputs(self, num_tokens: int) -> list[Tensor]:
        return [torch.randn(num_tokens, self.weight.shape[1], device=self.device).to(self.dtype)
                for _ in range(self.num_copies)]

    def dense(self) -> list[Run]:
        first = self.weight.to_dense()
        copies = [first, *(first.clone() for _ in range(self.num_copies - 1))]
        return [functools.partial(torch.nn.functional.linear, weight=copy) for copy in copies]

    def candidates(self, num_tokens: int) -> list[tuple[str, Any, list[Run]]]:
        """(backend, variant, one run per copy) of all that take the weight and so many tokens."""
        runs = []
        for name, backend in BACKENDS.items():
            for variant in backend.variants(self.weight, self.dtype, self.device, num_tokens):
                if name not in self._packed:
                    first = backend.pack(self.weight, self.device)
                    self._packed[name] = [first, *(_clone(first) for _ in range(self.num_copies - 1))]
                runs.append((name, variant, [_bind(backend, packed, variant) for packed in self._packed[name]]))
        return runs

    def bound(self, runs: Sequence[Run], xs: Sequence[Tensor]) -> Callable[[], object]:
        """All copies, one after the other."""
        return lambda: [run(x) for run, x in zip(runs, xs)]


def time_in_turn(runs: Sequence[Callable[[], object]], device: torch.device, num_rounds: int,
                 as_graphs: bool = True) -> list[list[float]]:
    """Microseconds of each run in each round; all runs take turns within a round. On a GPU they are CUDA graphs, except where
    what they run asks the host, as experts and state spaces do."""
    if device.type == "cuda" and as_graphs:
        runs = [_graph(run) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for index in range(num_rounds + 1):  # in turn, so that a slow moment of the machine meets all
        for column, run in zip(times, runs):
            if device.type == "cuda":
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                stop.record()
                stop.synchronize()
                elapsed_us = start.elapsed_time(stop) * 1e3
            else:
                begin = time.perf_counter()
                run()
                elapsed_us = (time.perf_counter() - begin) * 1e6
            if index:  # the first round warms up
                column.append(elapsed_us)
    return times


def _graph(run: Callable[[], object]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles and warms up
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _bind(backend: Backend, packed: Any, variant: Any) -> Run:
    return lambda x: backend.run(x, packed, None, variant)


def _is_right(product: Callable[[], Tensor], reference: Tensor, name: str, variant: Any) -> bool:
    """Whether the backend runs here and gives dense's answer; a warning and False otherwise."""
    try:
        answer = product()
        if answer.is_cuda:
            torch.cuda.synchronize()
    except RuntimeError as error:  # what CUDA, Triton and cuSPARSELt raise for a shape that they do not take
        warnings.warn(f"backend {name} {variant} is left out: {str(error).splitlines()[0]}", stacklevel=2)
        return False
    error = float((answer.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30))
    if not error < TOLERANCE[reference.dtype]:
        warnings.warn(f"backend {name} {variant} is left out: its answer differs from dense by {error:.1e} at "
                      f"{tuple(reference.shape)}", stacklevel=2)
        return False
    return True


def _clone(packed: Any) -> Any:
    return type(packed)(*(value.clone() if isinstance(value, Tensor) else value for value in packed))


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or damaged: what it held is timed again
        return {}
    return known if isinstance(known, dict) else {}
