"""A product with a sparse weight that runs anywhere."""

import pytest
import torch
from layers import assert_product, mask_of

from raysearch.kernels import compress, linear


@pytest.mark.parametrize("pattern", [("unstructured", 1), ("2:4", 1), ("block", 16), ("block", 64)])
def test_linear_multiplies_slab_by_slab(pattern: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.kernels.weight.SLAB_ROWS", 64)
    mask = mask_of(*pattern, (300, 200), 0.5)
    dense, bias, x = torch.where(mask, torch.randn(300, 200), 0), torch.randn(300), torch.randn(7, 200)
    weight = compress(dense, mask, *pattern)
    assert_product(linear(x, weight, bias), x, dense, bias)
    assert linear(x.view(1, 7, 200), weight).shape == (1, 7, 300)
    with pytest.raises(ValueError, match=r"x must be \[..., 200\] in torch.float32 on cpu for this weight, got \(7, 100\)"):
        linear(x[:, :100], weight)
    with pytest.raises(ValueError, match="got .* in torch.float64"):
        linear(x.double(), weight)
