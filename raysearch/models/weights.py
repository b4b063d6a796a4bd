"""Weights on disk: safetensors in which a sparse tensor is a bitmap and its non-zero values.

A tensor of n weights with z non-zero ones takes ceil(n / 8) + z * itemsize bytes instead of n * itemsize, less than
dense above 1 / (8 * itemsize) sparsity (6.25 % in 16 bits, 3.125 % in 32). Where dense is smaller it is stored dense.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raysearch.kernels.weight import SparseWeight, compress
from raysearch.study.files import file_sha256

FORMAT = "raysearch-bitmap-1"
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
"""Those of safetensors."""


class Extent(NamedTuple):
    """What a tensor takes in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_values: int | None
    """Of a sparse one; None of one that is stored dense."""


def stored_bytes(num_weights: int, num_nonzero: int, itemsize: int) -> int:
    """Bytes of one tensor as `write_weights` stores it, the file's header left out."""
    return min(num_weights * itemsize, (num_weights + 7) // 8 + num_nonzero * itemsize)


def extent(shape: tuple[int, ...], dtype: torch.dtype, num_kept: int, num_nonzero: int) -> Extent:
    """Of a weight whose mask keeps `num_kept`, with nothing but zeros outside it: compressed where that is smaller.

    Where dense is smaller its zeros must say what the mask is, so a weight of which a kept value is 0 is compressed too.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    is_dense = num_kept == num_nonzero and stored_bytes(math.prod(shape), num_kept, dtype.itemsize) >= num_bytes
    return Extent(shape, dtype, None if is_dense else num_kept)


def to_store(tensor: Tensor, mask: Tensor | None) -> Tensor | SparseWeight:
    """What a file takes of a weight under its bool mask, both of one shape: on the CPU, and compressed as `extent` says, on
    the tensor's own device. A vector is a matrix of one row."""
    whole = tensor.detach().contiguous()
    if mask is None or extent(whole.shape, whole.dtype, int(mask.sum()), int(whole.count_nonzero())).num_values is None:
        return whole.cpu()
    return compress(whole.view(-1, whole.shape[-1]), mask.view(-1, whole.shape[-1])).moved(Tensor.cpu)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """OSError where the disk refuses what safetensors writes in the block."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


class WeightsFile:
    """A file of weights to `begin` and then fill, one at a time and in any order; equal weights make equal bytes. Where the
    disk refuses, which is an OSError, the same may be called again."""

    def __init__(self, path: Path, extents: Mapping[str, Extent]) -> None:
        parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for name, (shape, dtype, num_values) in extents.items():
            if num_values is None:
                parts[name] = dtype, shape
            else:
                num_weights = math.prod(shape)
                shapes[name] = num_weights // shape[-1], shape[-1]
                parts |= {f"{name}.bitmap": (torch.uint8, ((num_weights + 7) // 8,)), f"{name}.values": (dtype, (num_values,))}
        header: dict[str, object] = {"__metadata__": {"format": FORMAT, "shapes": json.dumps(shapes)}}
        self.path, self._places, end = path, dict[str, tuple[int, int]](), 0
        for name, (dtype, shape) in sorted(parts.items(), key=lambda part: (-part[1][0].itemsize, part[0])):  # all are aligned
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
            self._places[name] = start, end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._head = len(text).to_bytes(8, "little") + text

    def begin(self) -> None:
        self.path.write_bytes(self._head)

    def write(self, name: str, stored: Tensor | SparseWeight) -> None:
        """What `to_store` made, in its place."""
        parts = {f"{name}.bitmap": stored.bits, f"{name}.values": stored.values} if isinstance(stored, SparseWeight) else {
            name: stored}
        with open(self.path, "r+b") as file:
            for part, tensor in parts.items():
                start, end = self._places[part]
                assert tensor.nbytes == end - start, f"{part} takes {tensor.nbytes} bytes, announced were {end - start}"
                file.seek(len(self._head) + start)
                file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def write_weights(path: Path, tensors: Mapping[str, Tensor | SparseWeight]) -> str:
    """Writes what `to_store` made to `path` and returns the file's sha256. Raises OSError when the disk refuses."""
    file = WeightsFile(path, {
        name: Extent(stored.shape, stored.values.dtype, stored.values.numel()) if isinstance(stored, SparseWeight)
        else Extent(tuple(stored.shape), stored.dtype, None) for name, stored in tensors.items()})
    file.begin()
    for name, stored in tensors.items():
        file.write(name, stored)
    return file_sha256(path)


def read_weights(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """The dense tensors of a file of `write_weights`; ValueError when it is damaged or its checksum differs."""
    return {name: weight.to_dense() if isinstance(weight, SparseWeight) else weight
            for name, weight in read_sparse(path, sha256).items()}


def read_sparse(path: Path, sha256: str | None) -> Mapping[str, Tensor | SparseWeight]:
    """The tensors of a file of `write_weights` as they are stored, each mapped when it is asked for; ValueError as above."""
    try:
        if sha256 is not None and (actual := file_sha256(path)) != sha256:
            raise ValueError(f"{path}: checksum {actual[:12]} differs from the recorded {sha256[:12]}, so the file "
                             "was damaged after it was written; delete its folder to compute the round again")
        with safe_open(path, "pt") as file:
            metadata, parts = file.metadata() or {}, set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: its format must be {FORMAT}, got {metadata.get('format')}")
    return _Stored(path, parts, {name: (rows, columns) for name, (rows, columns) in json.loads(metadata["shapes"]).items()})


class _Stored(Mapping[str, Tensor | SparseWeight]):
    def __init__(self, path: Path, parts: set[str], shapes: dict[str, tuple[int, int]]) -> None:
        self._path, self._shapes = path, shapes
        self._names = sorted(parts - {f"{name}.{part}" for name in shapes for part in ("bitmap", "values")} | shapes.keys())

    def __getitem__(self, name: str) -> Tensor | SparseWeight:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, "pt") as file:
            if name not in self._shapes:
                whole: Tensor = file.get_tensor(name)
                return whole
            return SparseWeight(self._shapes[name], "unstructured", 1, file.get_tensor(f"{name}.bitmap"),
                                file.get_tensor(f"{name}.values").view(-1, 1, 1))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
