"""The path of the learning rate over the steps of a round, or of a pretraining."""

import math

from raysearch.config import LrSchedule


def learning_rate_at(step: int, num_steps: int, peak: float, num_warmup: int, schedule: LrSchedule = "cosine") -> float:
    """Linear warm-up over `num_warmup` steps, then a half cosine down to a tenth of the peak, or the peak.

    `one_cycle`, Smith & Topin 2018 (arXiv 1708.07120) as torch's OneCycleLR has it, has its own: half a cosine from a 25th of
    the peak over 0.3 of the steps, and another down to a 10,000th of where it began.
    """
    if schedule == "one_cycle":
        top, first = 0.3 * num_steps - 1, peak / 25
        start, end, p = (first, peak, step / top) if step <= top and top > 0 else (
            peak, first / 1e4, (step - top) / max(1.0, num_steps - 1 - top))
        return end + (start - end) * (1 + math.cos(math.pi * p)) / 2
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if schedule == "constant":
        return peak
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))
