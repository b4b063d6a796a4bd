"""The device that computes, by its own name."""

import torch

from raysearch.study.provenance import cpu_model


def device_name(device: str) -> str:
    """The accelerator's own name, or the processor's and the number of threads that torch uses."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {torch.get_num_threads()} threads"
