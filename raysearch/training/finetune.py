"""Fine-tuning: the learning rate's path, the loop over the action's span of the data, and divergence."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.training.data import Blocks
from raysearch.training.engine import Engine

LOSS_CHECK_STEPS = 50
"""A look at the loss waits for the device, so not every step is looked at."""


class Diverged(Exception):
    """The candidate is worthless: a loss that is not finite, or quality no better than a uniform guess."""


def learning_rate_at(step: int, num_steps: int, peak: float, num_warmup: int) -> float:
    """Linear warm-up over `num_warmup` steps, then a half cosine down to a tenth of the peak."""
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def finetune(engine: Engine, blocks: Blocks, action: Action, warmup_fraction: float,
             after_step: Callable[[int], object] = lambda step: None) -> float:
    """Trains the surviving weights on the action's span of the data; the mean loss of the last tenth of the steps, nats per
    token. `after_step` is called with the number of steps done, from 1. Collective. Raises Diverged on all ranks at once.

    The caller starts the optimizer afresh, and each round has a warm-up and decay of its own (learning-rate rewinding, Renda
    et al. 2020): so the result depends on the weights before and the action, and on nothing else. Rank r takes the r-th share
    of each step's sequences, so that a gang of any size reads the same tokens in a step.
    """
    num_sequences = engine.sequences_per_rank * engine.world_size
    context_tokens = blocks.tokens.shape[1]
    num_steps = action.finetune_tokens // (num_sequences * context_tokens)
    first = action.data_start_tokens // context_tokens + engine.rank * engine.sequences_per_rank
    losses: list[Tensor] = []
    for step in range(num_steps):
        tokens = blocks.stream(first + step * num_sequences, engine.sequences_per_rank, action.seed)
        rate = learning_rate_at(step, num_steps, action.learning_rate, round(num_steps * warmup_fraction))
        losses.append(engine.train_step(tokens, rate))
        after_step(step + 1)
        if step % LOSS_CHECK_STEPS == LOSS_CHECK_STEPS - 1 or step == num_steps - 1:
            tail = engine.mean(torch.stack(losses[-max(1, num_steps // 10):]).mean())
            if not math.isfinite(tail):
                raise Diverged(f"the training loss became {tail} within {step + 1} of {num_steps} steps at learning rate "
                               f"{action.learning_rate:g}")
    return tail
