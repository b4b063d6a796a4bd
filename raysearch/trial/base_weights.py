"""The dense model's weights in Ray's object store: one copy a node, which every rank of every gang maps."""

import warnings
from collections.abc import Mapping

import numpy as np
import ray
import torch
from torch import Tensor

from raysearch.config import Study
from raysearch.models.model import load_model


def put_base(study: Study) -> ray.ObjectRef:
    """The dense model's tensors in the object store, which keeps one copy per node for as long as the caller holds this:
    arrays by parameter name in the study's dtype, bfloat16 by its bits as int16, since numpy has no such number."""
    dtype = getattr(torch, study.model.dtype)
    bits = torch.int16 if dtype == torch.bfloat16 else dtype
    return ray.put({name: parameter.detach().view(bits).numpy()
                    for name, parameter in load_model(study.model.path, dtype).named_parameters()})


def map_base(arrays: Mapping[str, np.ndarray], dtype: torch.dtype) -> dict[str, Tensor]:
    """`put_base`'s arrays as tensors of `dtype` on the object store's own memory: a write there ends the process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {name: torch.from_numpy(array).view(dtype) for name, array in arrays.items()}
