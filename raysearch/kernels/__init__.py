"""Sparse matrix products behind three functions, and one that puts them into a model.

`compress` makes a SparseWeight of a weight and a mask, `linear` multiplies with it anywhere, `best_backend` says what is
fastest here; `sparsify_for_inference` lets a model run on it. Nothing above this package knows a backend. And
`selection_passes` is how exact selection reads weights on a device.
"""

from raysearch.kernels.backends import selection_passes
from raysearch.kernels.dispatch import Choice, best_backend
from raysearch.kernels.inference import Report, SparseLinear, linear, sparsify_for_inference
from raysearch.kernels.weight import SparseWeight, compress, detect_pattern

__all__ = ["Choice", "Report", "SparseLinear", "SparseWeight", "best_backend", "compress", "detect_pattern", "linear",
           "selection_passes", "sparsify_for_inference"]
