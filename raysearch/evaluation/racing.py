"""When a candidate may stop being scored: a rival that is no larger is better on all items, at a stated level.

Legend: N items, of which the first n in a random order are scored; d [n] = loss of the candidate minus that of the rival,
item by item; a loss is 0 or more, lower is better.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

FIRST_ITEMS = 64
"""Items before the first look; each further look comes at half as many again."""
BET_SHARE = 0.5
"""Share of the largest bet that keeps the capital positive; c in Waudby-Smith and Ramdas."""


def item_order(num_items: int, seed: int) -> NDArray[np.int64]:
    """The random order [N] that all candidates of a study share; the level holds over it."""
    return np.random.default_rng(seed).permutation(num_items)


def looks(num_items: int) -> list[int]:
    """Numbers of items after which the bound is checked: 64, 96, 144, ... below `num_items`."""
    found, look = [], FIRST_ITEMS
    while look < num_items:
        found.append(look)
        look = look * 3 // 2
    return found


def log_evidence(losses: ArrayLike, rival: ArrayLike) -> float:
    """Logarithm of the largest e-value so far against "over all N items the candidate is as good as the rival".

    losses [n]: the candidate's, in the shared order; rival [N]: all of the rival's, in that order. Testing by betting
    without replacement (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", section
    5 and eq. 40 for the bets): under the hypothesis the mean of what is left before item t is at most
    m_t = -(d_1 + ... + d_(t-1)) / (N - t + 1), so the capital prod(1 + bet_t * (d_t - m_t)) is a supermartingale for
    bets that know the past only, and by Ville's inequality it ever reaches 1 / level with probability at most `level`.
    Differs in the range: only d_t >= -(largest loss of the rival among the items left) is needed, which is known,
    so the candidate's losses need no upper bound. Infinite once no outcome of the items left could make it as good.
    """
    candidate, other = np.asarray(losses, float), np.asarray(rival, float)
    num_items, differences = len(other), candidate - other[:len(candidate)]
    largest = np.maximum.accumulate(other[::-1])[::-1]  # of the rival's losses from item t on
    total = squares = capital = best = 0.0
    for t, difference in enumerate(differences):
        mean_left = -total / (num_items - t)
        room = mean_left + largest[t]
        if room < 0:
            return float("inf")
        mean = total / (t + 1)
        variance = (1e-12 + squares) / (t + 1) - mean**2  # about the running mean, shrunk to 0 by one item
        lead = mean - mean_left
        bet = lead / (max(variance, 1e-12) + lead**2) if lead > 0 else 0.0
        if room > 0:
            bet = min(bet, BET_SHARE / room)
        capital += np.log1p(bet * (difference - mean_left))
        best = max(best, capital)
        total += difference
        squares += difference**2
    return float("inf") if len(differences) == num_items and total > 0 else float(best)


def is_dominated(losses: ArrayLike, rival: ArrayLike, level: float) -> bool:
    """Whether the candidate may stop: wrong with probability at most `level` over the order, however often it is asked.

    One rival needs no union bound: the best one that is no larger is known before the candidate is scored.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return log_evidence(losses, rival) > -np.log(level)
