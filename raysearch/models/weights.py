"""Weights on disk: safetensors in which a sparse tensor is a bitmap and its non-zero values.

A tensor of n weights with z non-zero ones takes ceil(n / 8) + z * itemsize bytes instead of n * itemsize, less than
dense above 1 / (8 * itemsize) sparsity (6.25 % in 16 bits, 3.125 % in 32). Where dense is smaller it is stored dense.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raysearch.kernels.weight import SparseWeight, compress
from raysearch.study.files import file_sha256

FORMAT = "raysearch-bitmap-1"


def stored_bytes(num_weights: int, num_nonzero: int, itemsize: int) -> int:
    """Bytes of one tensor as `write_weights` stores it, the file's header left out."""
    return min(num_weights * itemsize, (num_weights + 7) // 8 + num_nonzero * itemsize)


def to_store(tensor: Tensor, mask: Tensor | None) -> Tensor | SparseWeight:
    """What `write_weights` takes of a weight under its bool mask, both of one shape: on the CPU, and compressed, on the
    tensor's own device, where that is smaller. A vector is a matrix of one row.

    Where dense is smaller its zeros must say what the mask is, so a weight of which a kept value is 0 is compressed too.
    """
    whole = tensor.detach().contiguous()
    if mask is None:
        return whole.cpu()
    says_the_mask = torch.equal(whole != 0, mask)
    if says_the_mask and stored_bytes(whole.numel(), int(mask.sum()), whole.itemsize) >= whole.nbytes:
        return whole.cpu()
    return compress(whole.view(-1, whole.shape[-1]), mask.view(-1, whole.shape[-1])).moved(Tensor.cpu)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """OSError where the disk refuses what safetensors writes in the block."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def write_weights(path: Path, tensors: Mapping[str, Tensor | SparseWeight]) -> str:
    """Writes what `to_store` made to `path` and returns the file's sha256; equal tensors make equal bytes. Raises OSError when
    the disk refuses."""
    out: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, SparseWeight):
            out[f"{name}.bitmap"], out[f"{name}.values"] = tensor.bits, tensor.values.view(-1)
            shapes[name] = tensor.shape
        else:
            out[name] = tensor
    with saving(path):
        save_file(out, path, metadata={"format": FORMAT, "shapes": json.dumps(shapes)})
    _sort_metadata(path)
    return file_sha256(path)


def _sort_metadata(path: Path) -> None:
    """safetensors (0.8) writes the metadata in the order of a hash map, which is another one each time."""
    with open(path, "r+b") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(num_bytes))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(num_bytes)
        assert len(text) == num_bytes, "the same JSON in another order is as long"
        file.seek(8)
        file.write(text)


def read_weights(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """The dense tensors of a file of `write_weights`; ValueError when it is damaged or its checksum differs."""
    return {name: weight.to_dense() if isinstance(weight, SparseWeight) else weight
            for name, weight in read_sparse(path, sha256).items()}


def read_sparse(path: Path, sha256: str | None) -> dict[str, Tensor | SparseWeight]:
    """The tensors of a file of `write_weights` as they are stored; ValueError as in `read_weights`."""
    try:
        actual = file_sha256(path)
        if sha256 is not None and actual != sha256:
            raise ValueError(f"{path}: checksum {actual[:12]} differs from the recorded {sha256[:12]}, so the file "
                             "was damaged after it was written; delete its folder to compute the round again")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: its format must be {FORMAT}, got {metadata.get('format')}")
    sparse = {name: SparseWeight((rows, columns), "unstructured", 1, stored.pop(f"{name}.bitmap"),
                                 stored.pop(f"{name}.values").view(-1, 1, 1))
              for name, (rows, columns) in json.loads(metadata["shapes"]).items()}
    return {**stored, **sparse}
