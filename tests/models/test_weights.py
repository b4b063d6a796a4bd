import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from raysearch.kernels.weight import SparseWeight
from raysearch.models.weights import FORMAT, WeightsFile, extent, read_weights, stored_bytes, to_store, write_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.05, 0.5, 1.0])
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: torch.dtype, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(37, 53, generator=generator).to(dtype)
    weight[torch.rand(37, 53, generator=generator) < sparsity] = 0
    bias = torch.tensor([0.0, 1.0, -0.0], dtype=dtype)
    path = tmp_path / "w.safetensors"
    sha256 = write_weights(path, {"w": to_store(weight, weight != 0), "b": to_store(bias, None)})
    back = read_weights(path, sha256)
    assert back["w"].dtype == dtype
    assert torch.equal(back["w"], weight)
    assert torch.equal(back["b"], bias)


@pytest.mark.parametrize(("sparsity", "itemsize"), [(0.0, 2), (0.0625, 2), (0.07, 2), (0.03, 4), (0.04, 4), (0.9, 2)])
def test_stored_bytes_are_the_bytes_in_the_file(tmp_path: Path, sparsity: float, itemsize: int) -> None:
    weight = torch.ones(100, 80, dtype={2: torch.bfloat16, 4: torch.float32}[itemsize])
    weight.view(-1)[:round(sparsity * 8000)] = 0
    path = tmp_path / "w.safetensors"
    write_weights(path, {"w": to_store(weight, weight != 0)})
    with safe_open(path, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert sum(t.numel() * t.element_size() for t in tensors) == stored_bytes(8000, int(weight.count_nonzero()), itemsize)


def test_break_even_is_one_bit_per_weight() -> None:
    assert stored_bytes(1600, 1500, 2) == 3200  # 6.25 % zeros: bitmap and values are as large as dense
    assert stored_bytes(1600, 1499, 2) == 3198


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    sha256 = write_weights(path, {"w": torch.randn(64)})
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum .* differs from the recorded"):
        read_weights(path, sha256)
    assert math.isfinite(float(read_weights(path, None)["w"].sum()))  # safetensors itself does not notice


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_weights(path, None)


def test_a_file_that_is_filled_in_any_order_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    """A round's bytes stay those that earlier versions wrote, and what a weight takes is known before it is gathered."""
    generator = torch.Generator().manual_seed(2)
    shapes_of = [(60, 5), (2, 3, 70), (99,), (4, 4), ()]
    weights = {f"h.{n}.ä\"": torch.randn(shape, generator=generator) for n, shape in enumerate(shapes_of)}
    masks = {name: torch.rand(weight.shape, generator=generator) < 0.5 for name, weight in list(weights.items())[:3]}
    for name, mask in masks.items():
        weights[name][~mask] = 0
    stored = {name: to_store(weight, masks.get(name)) for name, weight in weights.items()}
    extents = {name: extent(tuple(weight.shape), weight.dtype, int(masks.get(name, torch.ones_like(weight)).sum()),
                            int(weight.count_nonzero())) for name, weight in weights.items()}
    file = WeightsFile(tmp_path / "a.safetensors", extents)
    file.begin()
    for name in reversed(stored):
        file.write(name, stored[name])
    out, shapes = {}, {}
    for name, weight in stored.items():
        if isinstance(weight, SparseWeight):
            out |= {f"{name}.bitmap": weight.bits, f"{name}.values": weight.values.view(-1)}
            shapes[name] = weight.shape
        else:
            out[name] = weight
    assert len(shapes) == 3
    save_file(out, tmp_path / "b.safetensors", metadata={"format": FORMAT, "shapes": json.dumps(shapes)})
    content, others = ((tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors"))
    num_bytes = int.from_bytes(content[:8], "little")
    header, other = (json.loads(each[8:8 + num_bytes]) for each in (content, others))
    assert list(header.items())[1:] == list(other.items())[1:]
    assert header == other
    assert (content[:8], content[8 + num_bytes:]) == (others[:8], others[8 + num_bytes:])
    back = read_weights(tmp_path / "a.safetensors", None)
    assert all(torch.equal(back[name].view_as(weight), weight) for name, weight in weights.items())
