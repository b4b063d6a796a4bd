"""Checkpoints within a round that trains for long, so that one whose process died need not start anew."""

import time
from collections.abc import Callable

from raysearch.training.engine import Engine

LOOK_STEPS = 50
"""Whether it is time is rank 0's word, for which all ranks wait."""
TAIL = 10
"""No checkpoint in the last tenth of the steps, whose losses a round's record holds the mean of."""


class Checkpoints:
    """Of the round `key` and of no other: `save(engine, step)` keeps what `load(engine)` comes back to, which returns the
    number of steps done, 0 where nothing was kept. Both are collective."""

    def __init__(self, key: str, every_s: float, save: Callable[[Engine, int], object], load: Callable[[Engine], int]) -> None:
        self.key, self.every_s, self._save, self._load = key, every_s, save, load

    def resume(self, engine: Engine, num_steps: int, after_step: Callable[[int], object]
               ) -> tuple[int, Callable[[int], object]]:
        """(steps done by the last checkpoint, to which it brings the engine; `after_step`, which also makes the next ones)."""
        done, last = self._load(engine), time.monotonic()
        last_step = num_steps - max(1, num_steps // TAIL)

        def keeping(step: int) -> None:
            nonlocal last
            after_step(step)
            if step % LOOK_STEPS:
                return
            print(f"step {step:,}/{num_steps:,}", flush=True)
            if step <= last_step and engine.from_rank_0(lambda: time.monotonic() - last >= self.every_s):
                self._save(engine, step)
                last = time.monotonic()

        return done, keeping
