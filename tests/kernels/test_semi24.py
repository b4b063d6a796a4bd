"""Which weights cuSPARSELt takes. Its products are the suite's, in test_backends.py, on a GPU."""

import pytest
import torch
from layers import mask_of

from raysearch.kernels.semi24 import fits_semi24
from raysearch.kernels.weight import compress


@pytest.mark.parametrize(("pattern", "shape", "dtype", "fits"), [
    ("2:4", (32, 64), torch.bfloat16, True),
    ("2:4", (32, 64), torch.float16, True),
    ("2:4", (32, 64), torch.float32, False),
    ("2:4", (33, 64), torch.bfloat16, False),
    ("2:4", (32, 72), torch.bfloat16, False),
    ("unstructured", (32, 64), torch.bfloat16, False),
])
def test_what_fits(pattern: str, shape: tuple[int, int], dtype: torch.dtype, fits: bool) -> None:
    mask = mask_of("2:4", 1, shape, 0.5)
    assert fits_semi24(compress(torch.ones(shape, dtype=dtype), mask, pattern), dtype) == fits
