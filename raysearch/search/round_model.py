"""What a round would give, from the rounds that were seen: a Gaussian process for each target.

n rounds, m proposals, t targets (objectives and what is missed of constraints), c columns.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from raysearch.config import Action

Floats = NDArray[np.float64]
MAX_ROUNDS = 400
"""The newest, that are fitted: O(n^3)."""
MAX_LENGTHS = 100
"""Of these, spread over all, the lengths and the noise are fitted to."""
GROWTH = 1.3
"""The lengths are fitted anew when there are so many times more rounds than at the last time."""
NOT_SEEN = {"data_start_tokens", "seed", "sparsity", "threshold"}
"""Fields of an action that are no columns as they are."""


class Start(NamedTuple):
    """Of a round: what is known of its parent."""

    sparsity: float
    losses: Floats
    """(d,)"""


Step = tuple[Start, Action]


class RoundModel:
    """Mean and standard deviation of the targets of a round. The noise is fitted, and not the metric's standard error: all
    candidates are scored on the same items, so that they differ by much less (docs/log.md)."""

    def __init__(self) -> None:
        self._fitted: list[GaussianProcessRegressor] = []
        self._num_fitted = 0

    def fit(self, steps: Sequence[Step], targets: Floats) -> None:
        """n rounds, (n, t)."""
        steps, targets = steps[-MAX_ROUNDS:], targets[-MAX_ROUNDS:]
        is_new = len(steps) >= GROWTH * self._num_fitted or len(self._fitted) != targets.shape[1]
        if is_new:
            self._learn_columns(steps)
            self._num_fitted = len(steps)
        columns = self._columns(steps)
        if is_new:
            some = np.unique(np.linspace(0, len(steps) - 1, MAX_LENGTHS).astype(int))
            prior = ConstantKernel(1.0) * RBF(2 * np.ones(columns.shape[1]), (0.2, 1e3)) + WhiteKernel(1e-2, (1e-6, 1e1))
            with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # at its bound: without influence
                self._kernels = [GaussianProcessRegressor(prior, normalize_y=True).fit(columns[some], target[some]).kernel_
                                 for target in targets.T]
        self._fitted = [GaussianProcessRegressor(kernel, optimizer=None, normalize_y=True).fit(columns, target)
                        for kernel, target in zip(self._kernels, targets.T)]

    def __call__(self, steps: Sequence[Step]) -> tuple[Floats, Floats]:
        """m proposals -> mean (m, t), standard deviation (m, t)."""
        columns = self._columns(steps)
        means, deviations = zip(*(each.predict(columns, return_std=True) for each in self._fitted))
        return np.stack(means, axis=1), np.stack(deviations, axis=1)

    def _learn_columns(self, steps: Sequence[Step]) -> None:
        fields = [action.model_dump(exclude=NOT_SEEN) for _, action in steps]
        self._choices = {name: sorted({row[name] for row in fields}) for name in fields[0] if isinstance(fields[0][name], str)}
        positive = {name: [row[name] for row in fields if row[name] > 0] for name in fields[0] if name not in self._choices}
        self._scales = {name: min(values) for name, values in positive.items() if values}
        raw = self._raw(steps)
        self._shift, self._spread = raw.mean(axis=0), raw.std(axis=0)

    def _columns(self, steps: Sequence[Step]) -> Floats:
        """(n, c), without those that never differed."""
        varies = self._spread > 1e-9
        return (self._raw(steps) - self._shift)[:, varies] / self._spread[varies]

    def _raw(self, steps: Sequence[Step]) -> Floats:
        """The parent; densities as logarithms; other numbers on a scale that is linear up to the smallest and logarithmic above
        it; choices one by one."""
        rows = []
        for start, action in steps:
            fields, before = action.model_dump(exclude=NOT_SEEN), np.log1p(-min(start.sparsity, 0.9999))
            after = before if action.sparsity is None else np.log1p(-min(action.sparsity, 0.9999))
            rows.append([start.sparsity, *start.losses, after, after - before,
                         action.threshold is None, action.threshold or 0.0,
                         *(np.arcsinh(fields[name] / scale) for name, scale in self._scales.items()),
                         *(fields[name] == choice for name, choices in self._choices.items() for choice in choices)])
        return np.array(rows, dtype=np.float64)
