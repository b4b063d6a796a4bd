"""What a candidate scored on each item, from which its metrics, standard errors and races are computed; as files.

A file is numpy's .npz, which opens anywhere: `names` are those of the metrics, as "task/metric", and each has the arrays
"task/metric/numerator", "task/metric/weight", "task/metric/cluster" and "task/metric/item".
"""

import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raysearch.study.files import new_file
from raysearch.study.storage import AnyPath

DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise for a file that holds other bytes than were written."""


class Items(NamedTuple):
    """One metric's items, n of them, in the order in which they were scored. Up to the metric's own last step (an exponential,
    bits for nats) the metric is sum(numerator) / sum(weight)."""

    numerator: NDArray[np.float64]
    """[n]; an accuracy's 0 or 1, nats of a perplexity."""
    weight: NDArray[np.float64]
    """[n]; bytes, words or tokens, or 1."""
    cluster: NDArray[np.uint64]
    """[n]; equal for items that were cut from one document, so that errors can count the document and not its pieces."""
    item: NDArray[np.int64]
    """[n]; index in the task, which says what two candidates have in common where one is a race that ended early."""

    def in_task_order(self) -> "Items":
        order = np.argsort(self.item, kind="stable")
        return Items(self.numerator[order], self.weight[order], self.cluster[order], self.item[order])


class Form(NamedTuple):
    """A metric's last step from r = sum(numerator) / sum(weight): r / unit, or exp(r)."""

    unit: float = 1.0
    is_exponential: bool = False

    def value(self, ratio: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(over="ignore"):
            return np.exp(ratio) if self.is_exponential else ratio / self.unit


MEAN, BITS, PERPLEXITY = Form(), Form(unit=math.log(2)), Form(is_exponential=True)


def form_of(metric: str) -> Form:
    """By the metric's name ("task/metric"), as config.higher_is_better knows its direction."""
    return PERPLEXITY if metric.endswith("perplexity") else BITS if metric.endswith("bits_per_byte") else MEAN


DTYPES = [np.dtype(name) for name in ("float64", "float64", "uint64", "int64")]


def write_items(path: AnyPath, items: Mapping[str, Items]) -> None:
    """Keys are "task/metric". Equal items make equal bytes."""
    arrays = {f"{name}/{field}": np.asarray(values, dtype) for name, columns in items.items()
              for field, values, dtype in zip(Items._fields, columns, DTYPES)}
    names = np.array(list(items), dtype=str)  # a damaged directory of a .zip can lose entries without a word
    with new_file(path) as file, open(file, "wb") as handle:  # numpy would add .npz to a name
        np.savez_compressed(handle, allow_pickle=False, names=names, **arrays)


def read_items(path: AnyPath) -> dict[str, Items]:
    """ValueError of one sentence for a file that is damaged or holds something else."""
    content = path.read_bytes()  # its OSError is the storage's, any below are the content's
    try:
        if not zipfile.is_zipfile(io.BytesIO(content)):  # np.load would also take a lone .npy
            raise ValueError("it is no .npz, or not all of one")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            items = {name: Items(*(arrays[f"{name}/{field}"] for field in Items._fields)) for name in arrays["names"].tolist()}
        for name, columns in items.items():
            if [values.dtype for values in columns] != DTYPES or {values.shape for values in columns} != {(columns.item.size,)}:
                raise ValueError(f"{name} has arrays of other types or lengths")
        return items
    except DAMAGED as error:
        raise ValueError(f"{path}: not the items of a candidate ({error}); it was damaged or made by another "
                         "version") from error
