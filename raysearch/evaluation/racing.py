"""When a candidate may stop being scored: a rival that is no larger is better on all items, at a stated level.

Legend: N items, of which the first n in a random order are scored; c_i, r_i = loss of the candidate and of the rival on item
i, 0 or more, lower is better; Q caps.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raysearch.study.items import Items

FIRST_ITEMS = 32
"""Items before the first look; each further look comes at half as many again. With 64 dominated candidates were scored on
6.6 times fewer items than all, with 32 on 9.6 times fewer (2026-11-25, docs/log.md)."""
BET_SHARE = 0.75
"""Share of the largest bet that keeps the capital positive; c in Waudby-Smith and Ramdas."""
CAPS = (0.5, 0.75, 0.9, 1.0)
"""Quantiles of the rival's losses at which they are capped, one bettor each: uncapped, its hardest item (32 nats) limits
every bet."""


def item_order(num_items: int, seed: int) -> NDArray[np.int64]:
    """The random order [N] that all candidates of a study share; the level holds over it."""
    return np.random.default_rng(seed).permutation(num_items)


def item_losses(items: Items, higher_is_better: bool) -> NDArray[np.float64]:
    """[n], 0 or more, whose sum orders models on equal items as the metric does, lower is better: nats of a perplexity,
    1 - x of an accuracy."""
    return items.weight - items.numerator if higher_is_better else items.numerator


def in_item_order(items: Items, seed: int) -> Items:
    """All N items of a candidate in `item_order`, in whatever order they were scored."""
    order = np.argsort(items.item)[item_order(len(items.item), seed)]
    return Items(*(values[order] for values in items))


def looks(num_items: int) -> list[int]:
    """Numbers of items after which the bound is checked: 32, 48, 72, ... below `num_items`."""
    numbers, look = [], FIRST_ITEMS
    while look < num_items:
        numbers.append(look)
        look = look * 3 // 2
    return numbers


def log_evidence(losses: ArrayLike, rival: ArrayLike) -> float:
    """Logarithm of the largest e-value so far against "over all N items the candidate is as good as the rival".

    losses [n]: the candidate's, in the shared order; rival [N]: all of the rival's, in that order. Testing by betting
    without replacement (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", section
    5 and eq. 40 for the bets): x_i with a sum of at most 0 under the hypothesis have at most the mean
    m_t = -(x_1 + ... + x_(t-1)) / (N - t + 1) among the items left, so the capital prod(1 + bet_t * (x_t - m_t)) is a
    supermartingale for bets that know the past only, and by Ville's inequality it ever reaches 1 / level with probability
    at most `level`. Differs in two ways. A bet is limited by a lower end of x_t only: the candidate's losses need no upper
    bound. And the rival serves as a control variate, x_i = c_i - g(r_i) + mean(g(r)) - mean(r): g = min(r, cap) leaves the
    sum of x as it is, and a low cap raises the lower end, so that a few hard items do not keep all bets small. The mean
    capital of one bettor per cap is a supermartingale too. Infinite once no outcome of the items left could make it as good.
    """
    candidate, other = np.asarray(losses, float), np.asarray(rival, float)
    num_items, n = len(other), len(candidate)
    if n == 0:
        return 0.0
    capped = np.minimum(other[:, None], np.quantile(other, CAPS))  # [N, Q]
    shift = capped.mean(axis=0) - other.mean()
    largest = np.maximum.accumulate(capped[::-1])[::-1]  # among the items from t on
    left = other.sum() - np.cumsum(other[:n])  # what the rival may still lose
    if (np.cumsum(candidate - other[:n]) > left + 1e-9 * other.sum()).any():  # losses are 0 or more; the rest is rounding
        return float("inf")
    x = candidate[:, None] - capped[:n] + shift  # [n, Q]
    total, squares = (np.cumsum(values, axis=0) - values for values in (x, x**2))  # of the items before t
    t = np.arange(n)[:, None]
    mean_left = -total / (num_items - t)
    room = np.maximum(mean_left + largest[:n] - shift, 1e-12)
    mean = total / (t + 1)
    variance = (1e-12 + squares) / (t + 1) - mean**2  # about the running mean, shrunk to 0 by one item
    lead = np.maximum(mean - mean_left, 0)
    bet = np.minimum(lead / (np.maximum(variance, 1e-12) + lead**2), BET_SHARE / room)
    log_capital = np.cumsum(np.log1p(bet * (x - mean_left)), axis=0)
    return max(0.0, float((np.logaddexp.reduce(log_capital, axis=1) - np.log(len(CAPS))).max()))


def is_dominated(losses: ArrayLike, rival: ArrayLike, level: float) -> bool:
    """Whether the candidate may stop: wrong with probability at most `level` over the order, however often it is asked.

    One rival needs no union bound: the best one that is no larger is known before the candidate is scored.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return log_evidence(losses, rival) > -np.log(level)
