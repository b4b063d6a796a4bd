"""Sparse matrix products on tensors, behind three functions; it knows no model.

`compress` makes a SparseWeight of a weight and a mask, `linear` multiplies with it anywhere, `best_backend` says what is
fastest here. Nothing above this package knows a backend. And `selection_passes` is how exact selection reads weights and scores
on a device.
"""

from raysearch.kernels.backends import selection_passes
from raysearch.kernels.device import device_name
from raysearch.kernels.dispatch import Choice, best_backend
from raysearch.kernels.linear import linear
from raysearch.kernels.weight import SparseWeight, compress, detect_pattern

__all__ = ["Choice", "SparseWeight", "best_backend", "compress", "detect_pattern", "device_name", "linear",
           "selection_passes"]
