"""Items as files: they come back bit for bit, and a damaged file is refused or whole."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from raysearch.study.items import Items, read_items, write_items
from raysearch.study.storage import AnyPath


def items(num_items: int, seed: int = 0) -> Items:
    random = np.random.default_rng(seed)
    return Items(random.exponential(3.0, num_items), random.integers(1, 400, num_items).astype(float),
                 random.integers(0, 2**64, num_items, dtype=np.uint64), random.permutation(num_items))


def equal(one: dict[str, Items], other: dict[str, Items]) -> bool:
    """In every bit, types and order included."""
    return list(one) == list(other) and all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes() for name in one for a, b in zip(one[name], other[name], strict=True))


def test_items_come_back_bit_for_bit(anywhere: AnyPath) -> None:
    path = anywhere / "rounds" / "k" / "items.report.npz"
    written = {"text/bits_per_byte": items(40), "gsm8k/exact_match,strict-match": items(3, seed=1), "none/acc": items(0)}
    write_items(path, written)
    assert equal(read_items(path), written)
    before = path.read_bytes()
    write_items(path, written)
    assert path.read_bytes() == before
    write_items(path, {})
    assert read_items(path) == {}
    assert [each.name for each in path.parent.iterdir()] == ["items.report.npz"]


def test_hashes_with_the_highest_bit_are_kept(tmp_path: Path) -> None:
    clusters = np.array([0, 2**63, 2**64 - 1], np.uint64)
    write_items(tmp_path / "i.npz", {"t/m": items(3)._replace(cluster=clusters)})
    assert read_items(tmp_path / "i.npz")["t/m"].cluster.tolist() == [0, 2**63, 2**64 - 1]


def test_every_flipped_bit_and_every_cut_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path, written = tmp_path / "items.selection.npz", {"text/acc": items(5), "text/bits_per_byte": items(4)}
    write_items(path, written)
    whole, num_refused = path.read_bytes(), 0
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    damaged += [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:] for at in range(len(whole))]
    for content in damaged:
        path.write_bytes(content)
        try:
            with warnings.catch_warnings(action="ignore"):
                read = read_items(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: not the items of a candidate (")  # noqa: PT017  one of two good ends
            num_refused += 1
        else:
            assert equal(read, written)  # a date, a permission: nothing that is read
    assert num_refused > len(damaged) / 2


@pytest.mark.parametrize(("wrong", "sentence"), [
    ({"t/m/numerator": np.zeros(2)}, "t/m/weight is not a file in the archive"),
    (items(2)._replace(cluster=np.zeros(2)), "t/m has arrays of other types or lengths"),
    (items(2)._replace(weight=np.ones(3)), "t/m has arrays of other types or lengths"),
    (items(2)._replace(item=np.array(1)), "t/m has arrays of other types or lengths"),
    (items(2)._replace(cluster=np.array(["a", None], object)), "Object arrays cannot be loaded"),
])
def test_what_are_no_items_is_refused(wrong: dict[str, np.ndarray] | Items, sentence: str, tmp_path: Path) -> None:
    arrays = {f"t/m/{field}": values for field, values in wrong._asdict().items()} if isinstance(wrong, Items) else wrong
    np.savez(tmp_path / "i.npz", names=["t/m"], **arrays)
    with pytest.raises(ValueError, match=rf"i.npz: not the items of a candidate \(.*{sentence}.*\); it was damaged or made by"):
        read_items(tmp_path / "i.npz")


def test_a_lone_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "i.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"i.npy: not the items of a candidate \(it is no .npz, or not all of one\)"):
        read_items(tmp_path / "i.npy")


def test_a_missing_file_is_no_damaged_one(anywhere: AnyPath) -> None:
    with pytest.raises(FileNotFoundError):
        read_items(anywhere / "items.report.npz")
