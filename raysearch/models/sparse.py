"""A model that runs on sparse kernels where they win: compacted first, then layer by layer as the dispatcher decides."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raysearch.kernels.backends import BACKENDS
from raysearch.kernels.dispatch import NUM_PAIRS, WIN, Choice, best_backend, time_in_turn, token_bucket
from raysearch.kernels.linear import linear
from raysearch.kernels.weight import SparseWeight, compress, detect_pattern
from raysearch.models.architectures import architecture, dense_weight
from raysearch.models.compact import Compaction, compact
from raysearch.models.model import context_limit, is_linear

MIN_SPARSITY = 0.3
"""Below it no layout is smaller than the dense one, and nothing is timed."""
FEW_TOKENS, MANY_TOKENS = 16, 4096
"""A decoding step and a scoring batch: what an untimed layer chooses for."""


class SparseLinear(nn.Module):
    """A linear layer [O, K] that runs, for each number of tokens, on the backend that was chosen for it.

    The choice depends on shapes alone and nothing waits for the device, so CUDA graphs can hold it. Where dense won, or a
    chosen backend does not take every number of tokens, it keeps the dense weight too; without one it multiplies slab by
    slab. Without `choices` it takes, untimed, the first backend that fits, anew on every device that it is moved to.
    """

    def __init__(self, weight: SparseWeight, bias: Tensor | None, choices: dict[int, Choice] | None = None,
                 dense: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)
        self.register_buffer("dense", dense)
        self._use(weight, choices)

    @property
    def weight(self) -> Tensor:
        """[O, K], dense, made anew where it is not kept: some families multiply by their layers' weights themselves."""
        return self.sparse.to_dense() if self.dense is None else self.dense

    def _use(self, weight: SparseWeight, choices: dict[int, Choice] | None) -> None:
        self.sparse = weight
        self.choices = dict(sorted((untimed(weight) if choices is None else choices).items()))
        self.packed = {choice.backend: BACKENDS[choice.backend].pack(weight, weight.values.device)
                       for choice in self.choices.values() if choice.backend != "dense"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        """What `.to()`, `.cuda()` and `.float()` do: the kept weights move, and are packed again."""
        super()._apply(fn, recurse)
        moved = self.sparse.moved(fn)
        if moved.values.device != self.sparse.values.device or moved.values.dtype != self.sparse.values.dtype:
            self._use(moved, None)
        return self

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        choice = self._choice(len(flat))
        if choice.backend != "dense":
            y = BACKENDS[choice.backend].run(flat, self.packed[choice.backend], self.bias, choice.variant)
        elif self.dense is not None:
            y = nn.functional.linear(flat, self.dense, self.bias)
        else:
            y = linear(flat, self.sparse, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _choice(self, num_tokens: int) -> Choice:
        """Of the smallest decided number of tokens that is not exceeded, else of the largest."""
        bucket = token_bucket(num_tokens)
        choice = next((choice for tokens, choice in self.choices.items() if bucket <= tokens), [*self.choices.values()][-1])
        if bucket in self.choices or self.dense is None or takes(choice, self.sparse, bucket):
            return choice
        return Choice(backend="dense")  # nobody timed so many tokens, and the backend or its variant is not for them


def takes(choice: Choice, weight: SparseWeight, num_tokens: int) -> bool:
    """Whether the chosen backend has this variant for so many tokens."""
    return choice.backend == "dense" or choice.variant in BACKENDS[choice.backend].variants(
        weight, weight.values.dtype, weight.values.device, num_tokens)


def untimed(weight: SparseWeight) -> dict[int, Choice]:
    """The first variant of the first backend that takes few tokens, and many; dense, slab by slab, where none does."""
    values = weight.values
    first = {tokens: next(((name, variants[0]) for name, backend in BACKENDS.items()
                           if (variants := backend.variants(weight, values.dtype, values.device, tokens))), ("dense", 0))
             for tokens in (FEW_TOKENS, MANY_TOKENS)}
    return {tokens: Choice(backend=name, variant=variant) for tokens, (name, variant) in first.items()}


class Layer(NamedTuple):
    """What was decided for one linear layer."""

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    choices: dict[int, Choice]
    """By number of tokens."""


class Sparsified(NamedTuple):
    """What `sparsify_for_inference` did."""

    compaction: Compaction
    layers: list[Layer]
    """Every layer that was considered."""
    model_ratio: dict[int, float]
    """By number of tokens: how many times faster the whole forward became; 1.0 where it stayed dense."""
    tuning_s: float


@torch.no_grad()
def sparsify_for_inference(model: nn.Module, *, num_tokens: int | Sequence[int], cache: Path | None = None,
                           say: Callable[[str], object] = lambda line: None) -> Sparsified:
    """Cuts out what is dead, then replaces each linear layer for which a sparse backend wins, in place.

    num_tokens: tokens per forward that matter (a scoring batch, a decoding step); each is decided by itself. At the end
    the whole forward is timed dense and sparse in turn: numbers of tokens for which it is not faster go back to dense. The
    output head and embeddings stay dense. `say` gets a line where dead parts could not be cut out.
    """
    started = time.perf_counter()
    counts = [num_tokens] if isinstance(num_tokens, int) else list(num_tokens)
    compaction = compact(model, say)  # first: it gains anywhere, and sparse layers then have to beat the smaller dense ones
    layers: list[Layer] = []
    swaps: list[tuple[nn.Module, str, nn.Module, SparseLinear]] = []
    for name, parent, attribute, module in linear_layers(model):
        if not is_sparse(module):
            continue
        sparse = _compressed(module)
        choices = {token_bucket(count): best_backend(sparse, count, cache) for count in counts}
        pattern = sparse.pattern if sparse.block == 1 else f"{sparse.pattern} {sparse.block}"
        layers.append(Layer(name, sparse.shape, pattern, 1 - sparse.density, choices))
        if isinstance(module, SparseLinear) or any(choice.backend != "dense" for choice in choices.values()):
            bias = None if module.bias is None else module.bias.detach()
            is_plain = not isinstance(module, SparseLinear)  # whose memory lies as its family multiplies fastest
            layer = SparseLinear(sparse, bias, choices, dense_weight(module) if is_plain else sparse.to_dense())
            swaps.append((parent, attribute, _dense(layer) if isinstance(module, SparseLinear) else module, layer))
    ratios = dict.fromkeys(map(token_bucket, counts), 1.0)
    if swaps:
        ratios = {token_bucket(count): _model_ratio(model, swaps, count) for count in counts}
        _install(model, swaps, ratios)
    return Sparsified(compaction, layers, ratios, time.perf_counter() - started)


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Module, str, Any]]:
    """(name, parent, attribute, layer) of every nn.Linear and Conv1D but the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = dict(model.named_modules())
    return [(name, names[name.rpartition(".")[0]], name.rpartition(".")[2], module) for name, module in names.items()
            if (is_linear(module) or isinstance(module, SparseLinear)) and module is not head and name]


def is_sparse(layer: Any) -> bool:
    """Whether sparse kernels are tried for this linear layer."""
    return isinstance(layer, SparseLinear) or float((layer.weight == 0).float().mean()) >= MIN_SPARSITY


def _compressed(module: Any) -> SparseWeight:
    """In the most useful pattern, which no file of weights says."""
    weight = module.sparse.to_dense() if isinstance(module, SparseLinear) else dense_weight(module)
    mask = module.sparse.mask() if isinstance(module, SparseLinear) else weight != 0
    return compress(weight, mask, *detect_pattern(mask))


def _dense(layer: SparseLinear) -> nn.Linear:
    """The same layer as a plain one, which shares the dense weight."""
    assert layer.dense is not None
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(layer.dense, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias, requires_grad=False)
    return plain


def _model_ratio(model: nn.Module, swaps: list[tuple[nn.Module, str, nn.Module, SparseLinear]], num_tokens: int) -> float:
    """Time of the forward with the dense layers over that with the sparse ones, or 1.0 where that is below WIN: a gain within
    the noise would cost the memory of both forms."""
    device, forward = next(model.parameters()).device, own_forward(model)

    def run(which: int) -> None:
        for parent, attribute, *layers in swaps:
            setattr(parent, attribute, layers[which])
        forward(num_tokens)

    known = architecture(model)  # other families are scored without graphs too
    times = time_in_turn([lambda: run(0), lambda: run(1)], device, NUM_PAIRS,
                         as_graphs=known is not None and known.shares_prefixes)
    ratio = statistics.median(dense / sparse for dense, sparse in zip(*times))
    run(0)  # the dense layers again, until _install decides
    return ratio if ratio >= WIN else 1.0


def _install(model: nn.Module, swaps: list[tuple[nn.Module, str, nn.Module, SparseLinear]],
             ratios: dict[int, float]) -> None:
    """Puts in the sparse layers that are left when the numbers of tokens with no gain go back to dense."""
    for parent, attribute, module, layer in swaps:
        for tokens, choice in layer.choices.items():
            if ratios[tokens] <= 1.0:
                layer.choices[tokens] = choice.model_copy(update={"backend": "dense", "variant": 0})
        used = {choice.backend for choice in layer.choices.values()}
        layer.packed = {name: packed for name, packed in layer.packed.items() if name in used}
        # the dense weight goes only where the chosen backends take one token, few and many
        if "dense" not in used and all(takes(choice, layer.sparse, tokens) for choice in layer.choices.values()
                                       for tokens in (1, FEW_TOKENS, MANY_TOKENS)):
            layer.dense = None
        setattr(parent, attribute, layer if layer.packed else module)


def own_forward(model: Any) -> Callable[[int], object]:
    """The body of a transformers model as a function of a number of tokens, in sequences of 512 at most, that a CUDA graph
    can hold."""
    known = architecture(model)
    length = int(min(context_limit(model.config), 512))
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype

    def forward(num_tokens: int) -> object:
        width = min(num_tokens, length)
        tokens = torch.ones(max(1, num_tokens // width), width, dtype=torch.long, device=device)
        if known is None or not known.shares_prefixes:  # who knows what masks it takes
            return model.base_model(input_ids=tokens, use_cache=False)
        places = torch.arange(width, device=device)
        mask = torch.zeros(1, 1, width, width, dtype=dtype, device=device)
        mask = mask.masked_fill(places > places[:, None], torch.finfo(dtype).min)  # given, so that nothing asks the device
        return model.base_model(input_ids=tokens, position_ids=places[None], attention_mask=mask, use_cache=False)

    return forward
