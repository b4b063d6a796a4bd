"""The device that computes, by its own name."""

import pytest
import torch

from raysearch.kernels.device import device_name
from raysearch.study.provenance import cpu_model


def test_a_processor_is_named_with_its_threads() -> None:
    assert device_name("cpu") == f"{cpu_model()}, {torch.get_num_threads()} threads"


@pytest.mark.gpu
def test_a_gpu_is_named_as_torch_names_it() -> None:
    assert device_name("cuda:0") == torch.cuda.get_device_name(0)
