"""The conformance suite of the sparse backends: each gives the product of every weight that its line of the table names,
whatever the shape, the mask, the bias, the tokens and the strides, within what its dtype allows, and refuses all others."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from layers import SHAPES, assert_product, mask_of

from raysearch.kernels import bitmap, cpu, decode
from raysearch.kernels.backends import BACKENDS, MIN_SEMI24_TOKENS, Backend, compiles, hopper
from raysearch.kernels.weight import SparseWeight, compress

LARGE = [(512, 1024), (80, 11008), (96, 11008)]
"""Of weights on a GPU: more inputs than a block's threads or warps take at once, an odd and an even number of 16 outputs."""
TOKENS = (1, 2, 3, 8, 16, 33, 200, 300)
SPARSITIES = (0.0, 0.5, 0.95, 1.1)
"""Nothing, some, much and everything pruned."""
SINGLES = [("unstructured", 1), ("2:4", 1)]
BLOCKS = [("block", 16), ("block", 32), ("block", 64), ("block", 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Tenant(NamedTuple):
    """What a backend takes."""

    device: str
    patterns: list[tuple[str, int]]
    dtypes: list[torch.dtype]
    tokens: tuple[int, int]
    """Fewest and most of one product."""
    step: tuple[int, int]
    """Outputs and inputs must be multiples of these."""
    runs_here: Callable[[], bool]
    """Whether this machine, whose device it is, has the compiler and the instructions."""


def on_hopper(library: Callable[[], Any]) -> Callable[[], bool]:
    return lambda: hopper(0) and compiles("nvcc", library)


ANY = (1, 1 << 30)
TENANTS = {
    "block": Tenant("cuda", BLOCKS, [torch.bfloat16, torch.float16], ANY, (1, 8), lambda: True),
    "2:4": Tenant("cuda", [("2:4", 1)], [torch.bfloat16, torch.float16], (MIN_SEMI24_TOKENS, ANY[1]), (16, 16),
                  torch.backends.cusparselt.is_available),
    "decode": Tenant("cuda", SINGLES, [torch.bfloat16], (1, decode.MAX_TOKENS), (1, 8), on_hopper(decode.library)),
    "bitmap": Tenant("cuda", SINGLES, [torch.bfloat16], (1, bitmap.MAX_TOKENS), (1, 8), on_hopper(bitmap.library)),
    "csr": Tenant("cpu", SINGLES, [torch.float32], ANY, (1, 1), lambda: compiles("g++", cpu.library)),
    "amx": Tenant("cpu", BLOCKS[1:], [torch.bfloat16], ANY, (1, 1), lambda: compiles("g++", cpu.library) and cpu.has_amx()),
}
ON_ITS_DEVICE = [pytest.param(name, marks=pytest.mark.gpu) if tenant.device == "cuda" else name
                 for name, tenant in TENANTS.items()]


@pytest.fixture
def tenant(name: str) -> Tenant:
    """The backend's line, where it runs here."""
    found = TENANTS[name]
    if not found.runs_here():
        pytest.skip(f"backend {name} does not run on this machine")
    return found


def layer(pattern: tuple[str, int], shape: tuple[int, int], sparsity: float, dtype: torch.dtype,
          device: str) -> tuple[torch.Tensor, SparseWeight]:
    """(its dense form [O, K], the weight)."""
    mask = mask_of(*pattern, shape, sparsity).to(device)
    dense = torch.where(mask, torch.randn(shape, device=device), 0).to(dtype)
    return dense, compress(dense, mask, *pattern)


def takes(tenant: Tenant, pattern: tuple[str, int], shape: tuple[int, int], dtype: torch.dtype, num_tokens: int) -> bool:
    return (pattern in tenant.patterns and dtype in tenant.dtypes and tenant.tokens[0] <= num_tokens <= tenant.tokens[1]
            and shape[0] % tenant.step[0] == 0 and shape[1] % tenant.step[1] == 0)


def layers(tenant: Tenant) -> Iterator[tuple[torch.dtype, torch.Tensor, SparseWeight]]:
    """Of every kind that a backend takes."""
    torch.manual_seed(1)
    large = LARGE if tenant.device == "cuda" else []
    for pattern, dtype, shape, sparsity in itertools.product(tenant.patterns, tenant.dtypes, [*SHAPES, *large], SPARSITIES):
        if takes(tenant, pattern, shape, dtype, tenant.tokens[0]) and (shape not in large or dtype == tenant.dtypes[0]):
            yield dtype, *layer(pattern, shape, sparsity, dtype, tenant.device)


def test_every_backend_has_its_line() -> None:
    assert list(TENANTS) == list(BACKENDS)
    assert all(backend.name == name for name, backend in BACKENDS.items())


def product_is_right(backend: Backend, x: torch.Tensor, packed: Any, bias: torch.Tensor | None, variant: Any,
                     dense: torch.Tensor) -> None:
    assert_product(backend.run(x, packed, bias, variant), x, dense, bias)


@pytest.mark.parametrize("name", ON_ITS_DEVICE)
def test_products(name: str, tenant: Tenant) -> None:
    """All variants, with and without a bias. The block kernel is compiled for each variant, dtype, alignment and bias, 704
    times for all of these: all of its variants see every block side, and take turns at the rest, which makes 124, eight at a
    time."""
    backend, num_layers, turns, products = BACKENDS[name], 0, dict[Any, int](), list[Callable[[], None]]()
    for dtype, dense, weight in layers(tenant):
        num_outputs, num_inputs = weight.shape
        turn = turns.setdefault((weight.block, dtype, weight.shape), len(turns))
        in_turn = name == "block" and (dtype, weight.shape) != (tenant.dtypes[0], SHAPES[0])
        bias = torch.randn(num_outputs, device=dense.device).to(dtype)
        packed = backend.pack(weight, dense.device)
        for num_tokens in (count for count in TOKENS if tenant.tokens[0] <= count <= tenant.tokens[1]):
            x = torch.randn(num_tokens, num_inputs + 8, device=dense.device).to(dtype)[:, :num_inputs]  # not contiguous
            variants = backend.variants(weight, dtype, dense.device, num_tokens)
            for variant in variants[turn % len(variants):][:1] if in_turn else variants:
                for added in (bias, None)[turn % 2:][:1] if name == "block" else (bias, None):
                    products.append(partial(product_is_right, backend, x, packed, added, variant, dense))
        num_layers += 1
    with ThreadPoolExecutor(8 if name == "block" else 1) as pool:
        list(pool.map(lambda each: each(), products))
    assert num_layers >= len(tenant.patterns) * len(tenant.dtypes) * len(SPARSITIES)


@pytest.mark.parametrize("name", ON_ITS_DEVICE)
def test_what_the_line_names_is_taken(name: str, tenant: Tenant) -> None:
    for dtype, dense, weight in layers(tenant):
        for num_tokens in TOKENS:
            if takes(tenant, (weight.pattern, weight.block), weight.shape, dtype, num_tokens):
                assert BACKENDS[name].variants(weight, dtype, dense.device, num_tokens), (weight.shape, dtype, num_tokens)


@pytest.mark.parametrize("name", ON_ITS_DEVICE)
def test_what_the_line_does_not_name_is_left_to_others(name: str, tenant: Tenant) -> None:
    for pattern, dtype, shape, num_tokens in itertools.product(SINGLES + BLOCKS, DTYPES, SHAPES, TOKENS):
        if not takes(tenant, pattern, shape, dtype, num_tokens):
            dense, weight = layer(pattern, shape, 0.5, dtype, tenant.device)
            assert BACKENDS[name].variants(weight, dtype, dense.device, num_tokens) == [], (pattern, shape, dtype, num_tokens)


@pytest.mark.parametrize("name", [name for name, tenant in TENANTS.items() if tenant.device == "cuda"])
def test_a_gpus_backend_takes_nothing_on_a_processor(name: str) -> None:
    for pattern, dtype in itertools.product(SINGLES + BLOCKS, DTYPES):
        dense, weight = layer(pattern, (64, 128), 0.5, dtype, "cpu")
        assert not any(BACKENDS[name].variants(weight, dtype, dense.device, count) for count in (1, 8, 512))


@pytest.mark.parametrize("name", ON_ITS_DEVICE)
def test_a_product_is_the_same_twice_and_leaves_its_inputs(name: str, tenant: Tenant) -> None:
    """Also for a copy of what was packed, as the dispatcher times it."""
    shape, num_tokens = (64, 128), max(8, tenant.tokens[0])
    dense, weight = layer(tenant.patterns[0], shape, 0.5, tenant.dtypes[0], tenant.device)
    packed = BACKENDS[name].pack(weight, dense.device)
    copy = type(packed)(*(part.clone() if isinstance(part, torch.Tensor) else part for part in packed))
    x = torch.randn(num_tokens, shape[1], device=dense.device).to(dense.dtype)
    before = x.clone()
    variants = BACKENDS[name].variants(weight, dense.dtype, dense.device, num_tokens)
    assert variants
    for variant in variants:
        first = BACKENDS[name].run(x, packed, None, variant)
        assert torch.equal(BACKENDS[name].run(x, packed, None, variant), first)
        assert torch.equal(BACKENDS[name].run(x, copy, None, variant), first)
    assert torch.equal(x, before)
    assert torch.equal(weight.to_dense(), dense)


@pytest.mark.parametrize(("name", "pattern", "dtype", "sentence"), [
    ("csr", ("block", 32), torch.float32, "CSR kernel needs single weights in float32, got blocks of 32 in torch.float32"),
    ("csr", ("unstructured", 1), torch.bfloat16, "CSR kernel needs single weights in float32, got blocks of 1 in torch.bf"),
    ("amx", ("unstructured", 1), torch.bfloat16, "AMX kernel needs blocks of 32, 64 or 128 in bfloat16, got blocks of 1"),
    ("amx", ("block", 16), torch.bfloat16, "AMX kernel needs blocks of 32, 64 or 128 in bfloat16, got blocks of 16"),
    ("amx", ("block", 32), torch.float32, "AMX kernel needs blocks of 32, 64 or 128 in bfloat16, got blocks of 32 in torch.fl"),
    ("decode", ("unstructured", 1), torch.float32, "decode kernel needs single weights in bfloat16, got blocks of 1 in"),
    ("decode", ("block", 16), torch.bfloat16, "decode kernel needs single weights in bfloat16, got blocks of 16"),
    ("bitmap", ("unstructured", 1), torch.float32, "bitmap kernel needs single weights in bfloat16, got blocks of 1 in"),
    ("bitmap", ("block", 16), torch.bfloat16, "bitmap kernel needs single weights in bfloat16, got blocks of 16"),
    ("block", ("2:4", 1), torch.bfloat16, "block kernel needs a weight of pattern block, got 2:4"),
])
def test_a_layout_refuses_what_it_cannot_hold(name: str, pattern: tuple[str, int], dtype: torch.dtype, sentence: str) -> None:
    if name == "block":
        pytest.importorskip("triton")
    with pytest.raises(ValueError, match=sentence):
        BACKENDS[name].pack(layer(pattern, (64, 64), 0.5, dtype, "cpu")[1], torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode", "bitmap"])
def test_a_kernel_for_few_tokens_refuses_more(name: str, tenant: Tenant) -> None:
    dense, weight = layer(("unstructured", 1), (64, 128), 0.5, torch.bfloat16, "cuda")
    packed = BACKENDS[name].pack(weight, dense.device)
    (variant, *_) = BACKENDS[name].variants(weight, dense.dtype, dense.device, tenant.tokens[1])
    x = torch.randn(tenant.tokens[1] + 1, 128, device="cuda").bfloat16()
    with pytest.raises(ValueError, match=f"the {name} kernel takes at most {tenant.tokens[1]} tokens, got {len(x)}"):
        BACKENDS[name].run(x, packed, None, variant)


@pytest.mark.gpu
def test_the_block_kernel_is_compiled_once_for_all_numbers_of_tokens_and_rows() -> None:
    from raysearch.kernels import block

    def num_compiled(shape: tuple[int, int], num_tokens: int) -> int:
        dense, weight = layer(("block", 64), shape, 0.5, torch.bfloat16, "cuda")
        block.block_linear(torch.randn(num_tokens, 128, device="cuda").bfloat16(), block.pack_block(weight, "cuda"), None,
                           block.FEW_TOKENS[0])
        return len(block._block_linear.device_caches[torch.cuda.current_device()][0])

    first = num_compiled((64, 128), 1)
    for shape in ((64, 128), (1024, 128), (192, 128)):
        assert [num_compiled(shape, num_tokens) for num_tokens in (1, 3, 16)] == [first] * 3, shape
