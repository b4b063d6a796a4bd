"""The hard concrete distribution of gates that are exactly 0 or 1 now and then, Louizos et al. 2018 (arXiv 1712.01312).

All tensors are [U], one entry a gate; a = log_alpha is what is learned.
"""

import math

import torch
from torch import Tensor

BETA, LOW, HIGH = 0.33, -0.1, 1.1
"""Temperature, and the interval to which samples are stretched: those of Voita et al. 2019 (arXiv 1905.09418)."""
OPEN = 2.0
"""log_alpha of a gate that begins: of its samples 77 % are 1 and 6 % are 0."""


def sample(log_alpha: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(gate z, dz / d log_alpha), eq. 10 and 11: s = sigmoid((log u - log(1 - u) + a) / beta), z = clip(s (high - low) + low).
    `uniform`: numbers between 0 and 1."""
    s = torch.sigmoid((torch.logit(uniform, eps=1e-6) + log_alpha) / BETA)
    stretched = s * (HIGH - LOW) + LOW
    slope = (HIGH - LOW) / BETA * s * (1 - s)
    return stretched.clamp(0, 1), torch.where((stretched > 0) & (stretched < 1), slope, 0)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0), eq. 12: the L0 norm that is expected of a gate."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def settled(log_alpha: Tensor) -> Tensor:
    """The gate when nothing is sampled any more, eq. 13."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)
