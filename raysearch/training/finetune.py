"""Fine-tuning: the loop over the action's span of the data, and divergence."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.training.data import Blocks
from raysearch.training.engine import Engine
from raysearch.training.learning_rate import learning_rate_at

LOSS_CHECK_STEPS = 50
"""A look at the loss waits for the device, so not every step is looked at."""


class Diverged(ValueError):
    """The model is worthless: a loss or a score that is not finite, or quality no better than a uniform guess."""


def train(engine: Engine, blocks: Blocks, steps: range, rate_at: Callable[[int], float],
          after_step: Callable[[int, Tensor], object], *, first_sequence: int = 0, seed: int = 0) -> None:
    """The loop of all training, of rounds and of pretraining: step k reads the k-th share of the stream of shuffled epochs
    from `first_sequence` on. Rank r takes the r-th part of each share, so that a gang of any size reads the same tokens in a
    step. `after_step` gets the number of steps done, from 1, and this rank's loss."""
    num_sequences = engine.sequences_per_rank * engine.world_size
    for step in steps:
        start = first_sequence + step * num_sequences
        tokens = blocks.stream(start + engine.rank * engine.sequences_per_rank, engine.sequences_per_rank, seed)
        counted = blocks.counted(start, num_sequences, seed)  # of all ranks: the loss is the mean over what counts on any
        after_step(step + 1, engine.train_step(tokens, rate_at(step), counted=counted))


def finetune(engine: Engine, blocks: Blocks, action: Action, warmup_fraction: float,
             after_step: Callable[[int], object] = lambda step: None, first_step: int = 0) -> float:
    """Trains the surviving weights on the action's span of the data; the mean loss of the last tenth of the steps, nats per
    token. `after_step` is called with the number of steps done. Collective. Raises Diverged on all ranks at once. With a
    `first_step` the engine is as it was behind that many steps, and goes on.

    The caller starts the optimizer afresh, and each round has a warm-up and decay of its own (learning-rate rewinding, Renda
    et al. 2020): so the result depends on the weights before and the action, and on nothing else.
    """
    context_tokens = blocks.tokens.shape[1]
    num_steps = action.finetune_tokens // (engine.sequences_per_rank * engine.world_size * context_tokens)
    num_warmup, tail = round(num_steps * warmup_fraction), max(1, num_steps // 10)
    losses: list[Tensor] = []

    def rate_at(step: int) -> float:
        return learning_rate_at(step, num_steps, action.learning_rate, num_warmup, action.lr_schedule)

    def mean_of_tail() -> float:
        return engine.mean(torch.stack(losses[-tail:]).mean())

    def look(num_done: int, loss: Tensor) -> None:
        losses.append(loss)
        after_step(num_done)
        if num_done % LOSS_CHECK_STEPS == 0 or num_done == num_steps:
            latest = mean_of_tail()
            if not math.isfinite(latest):
                raise Diverged(f"the training loss became {latest} within {num_done} of {num_steps} steps at learning rate "
                               f"{action.learning_rate:g}")

    train(engine, blocks, range(first_step, num_steps), rate_at, look, seed=action.seed,
          first_sequence=action.data_start_tokens // context_tokens)
    return mean_of_tail()
