"""From a named schedule to the list of sparsities s_1..s_n that the rounds of a trial reach.

Notation: s_i initial sparsity, s_f target sparsity, n rounds, k = 1..n, p = k / n, r rate.
"""

import math
from collections.abc import Callable

SCHEDULES = ("one_shot", "constant", "linear", "exponential", "cubic", "cosine")
MAX_NUM_ROUNDS = 1000  # no study prunes this often; a smaller rate is a typing error that would run for ever
DECIMALS = 12  # two ways to say the same path then give equal lists, and equal round keys


def resolve_schedule(schedule: str, *, initial_sparsity: float = 0.0, target_sparsity: float | None = None,
                     num_rounds: int | None = None, rate: float | None = None) -> list[float]:
    """Return s_1..s_n, not decreasing, each in [0, 1) and rounded to 12 decimals.

    one_shot     s_1 = s_f
    constant     s_k = 1 - (1 - s_i)(1 - r)^k: the fraction r of the *remaining* weights goes each round; needs r and
                 either n or s_f (rounds until s_f is reached, the last one clipped to exactly s_f)
    linear       s_k = s_i + (s_f - s_i) p
    exponential  1 - s_k = (1 - s_i) ((1 - s_f) / (1 - s_i))^p: the density falls geometrically
    cubic        s_k = s_f + (s_i - s_f)(1 - p)^3, Zhu & Gupta 2017 (arXiv 1710.01878) eq. 1; differs in that t counts
                 rounds instead of steps, t_0 = 0, and the step at p = 0 (s_i itself) is left out
    cosine       s_k = s_i + (s_f - s_i)(1 - cos(pi p)) / 2: a half cosine, slow at both ends; differs from Intel Neural
                 Compressor's `cos`, the quarter cosine 1 - cos(pi p / 2), which is fastest at the end

    Raises ValueError, one sentence with the field, the rule and the value, for settings that contradict each other.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    _check_sparsity("initial_sparsity", initial_sparsity)
    if target_sparsity is not None:
        _check_sparsity("target_sparsity", target_sparsity)
        if target_sparsity < initial_sparsity:
            raise ValueError(f"target_sparsity must be at least initial_sparsity ({initial_sparsity:g}), got "
                             f"{target_sparsity:g}")
    if num_rounds is not None and not 1 <= num_rounds <= MAX_NUM_ROUNDS:
        raise ValueError(f"num_rounds must be between 1 and {MAX_NUM_ROUNDS}, got {num_rounds}")
    if schedule == "constant":
        return _constant(initial_sparsity, target_sparsity, num_rounds, rate)
    if rate is not None:
        raise ValueError(f"rate belongs to the constant schedule only, got {rate:g} with schedule {schedule}")
    if target_sparsity is None:
        raise ValueError(f"target_sparsity is required by schedule {schedule}, got none")
    if schedule == "one_shot":
        if num_rounds not in (None, 1):
            raise ValueError(f"num_rounds must be 1 or absent with schedule one_shot, got {num_rounds}")
        return [round(target_sparsity, DECIMALS)]
    if num_rounds is None:
        raise ValueError(f"num_rounds is required by schedule {schedule}, got none")
    path = _PATHS[schedule]
    sparsities = [path(initial_sparsity, target_sparsity, k / num_rounds) for k in range(1, num_rounds)]
    return [round(sparsity, DECIMALS) for sparsity in [*sparsities, target_sparsity]]


_PATHS: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda s_i, s_f, p: s_i + (s_f - s_i) * p,
    "exponential": lambda s_i, s_f, p: 1 - (1 - s_i) * math.pow((1 - s_f) / (1 - s_i), p),
    "cubic": lambda s_i, s_f, p: s_f + (s_i - s_f) * (1 - p) ** 3,
    "cosine": lambda s_i, s_f, p: s_i + (s_f - s_i) * (1 - math.cos(math.pi * p)) / 2,
}


def _constant(s_i: float, s_f: float | None, num_rounds: int | None, rate: float | None) -> list[float]:
    if rate is None:
        raise ValueError("rate is required by schedule constant, got none")
    if not 0 < rate < 1:
        raise ValueError(f"rate must be above 0 and below 1, got {rate:g}")
    if (num_rounds is None) == (s_f is None):
        got = "neither" if s_f is None else f"num_rounds {num_rounds} and target_sparsity {s_f:g}"
        raise ValueError(f"rate needs exactly one of num_rounds and target_sparsity beside it, got {got}")
    sparsities: list[float] = []
    while len(sparsities) != num_rounds:
        sparsity = round(1 - (1 - s_i) * (1 - rate) ** (len(sparsities) + 1), DECIMALS)
        if s_f is not None and sparsity >= round(s_f, DECIMALS):
            return [*sparsities, round(s_f, DECIMALS)]
        if len(sparsities) == MAX_NUM_ROUNDS:
            raise ValueError(f"rate must reach target_sparsity {s_f:g} within {MAX_NUM_ROUNDS} rounds, got {rate:g}")
        sparsities.append(sparsity)
    if sparsities[-1] >= 1:
        raise ValueError(f"rate must leave some weights after {num_rounds} rounds, got {rate:g}")
    return sparsities


def _check_sparsity(field: str, sparsity: float) -> None:
    if not (0 <= sparsity < 1 and round(sparsity, DECIMALS) < 1):  # NaN fails the comparison too
        raise ValueError(f"{field} must be at least 0 and below 1, got {sparsity:g}")
