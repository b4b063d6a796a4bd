"""A round of the recorded table, as a function: (parent's sparsity and quality, action) -> sparsity, quality, seconds.

A Gaussian process (squared exponential, one length a feature, by the marginal likelihood of some of the rounds) for
log(quality / dense), one for the log density that a threshold leaves, and a line in the tokens for the seconds. A round's error
is stated on rounds of trials that were held out; that of a chain, whose rounds start from predictions, on the last rounds of
those trials. No recorded round diverged, so none diverges here. Whoever searches this function may also find its errors: it
ranks nothing but whole methods.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.model_selection import GroupKFold

from raysearch.config import Action, Study

Floats = NDArray[np.float64]
MAX_LENGTHS = 300
"""Rounds, spread over all, to which a process's lengths are fitted; its mean is of all."""


class State(NamedTuple):
    sparsity: float
    value: float
    """Of the quality, over the dense model's."""


DENSE = State(0.0, 1.0)


class Round(NamedTuple):
    parent: State
    action: Action
    state: State
    seconds: float
    group: int
    """Of the trial, or of the fork alone."""


class Table(NamedTuple):
    space: str
    """Its module."""
    study: Study
    num_parameters: int
    num_prunable: int
    dense_value: float
    rounds: list[Round]
    chains: list[list[Round]]


def read_table(path: Path) -> Table:
    table = pq.read_table(path)
    rows: list[dict[str, Any]] = table.to_pylist()
    dense = rows[0]
    states = {row["key"]: State(row["sparsity"], row["value"] / dense["value"]) for row in rows}
    rounds, chains, groups = [], {}, {}
    for number, row in enumerate(rows):
        if row["parent"] is None:
            continue
        assert row["num_nonzero"] is not None, "a round diverged: the surrogate has no model of that"
        trial = (row["seed"], row["trial"] if row["trial"] is not None else -number)
        action = Action.model_validate_json(row["action"])
        rounds.append(Round(states[row["parent"]], action, states[row["key"]], row["seconds"],
                            groups.setdefault(trial, len(groups))))
        if row["trial"] is not None:
            chains.setdefault(trial, []).append(rounds[-1])
    return Table(table.schema.metadata[b"space"].decode(), Study.model_validate_json(table.schema.metadata[b"study"]),
                 dense["num_parameters"], dense["num_prunable"], dense["value"], rounds, list(chains.values()))


class Process:
    """Mean of a Gaussian process at one point, in microseconds."""

    def __init__(self, features: Floats, values: Floats) -> None:
        self.shift, self.scale = features.mean(axis=0), features.std(axis=0) + 1e-9
        kernel = ConstantKernel(1.0) * RBF(2 * np.ones(features.shape[1]), (0.2, 1e3)) + WhiteKernel(1e-2)
        some = np.unique(np.linspace(0, len(values) - 1, MAX_LENGTHS).astype(int))
        lengths = GaussianProcessRegressor(kernel, normalize_y=True).fit(self._scaled(features)[some], values[some])
        fitted = GaussianProcessRegressor(lengths.kernel_, optimizer=None, normalize_y=True).fit(self._scaled(features), values)
        self.variance, self.lengths = fitted.kernel_.k1.k1.constant_value, fitted.kernel_.k1.k2.length_scale
        self.points, self.weights = fitted.X_train_ / self.lengths, fitted.alpha_ * self.variance
        self.mean, self.deviation = float(values.mean()), float(values.std())

    def _scaled(self, features: Floats) -> Floats:
        return (features - self.shift) / self.scale

    def __call__(self, features: Floats) -> float:
        away = ((self.points - self._scaled(features) / self.lengths) ** 2).sum(axis=1)
        return float(np.exp(-0.5 * away) @ self.weights) * self.deviation + self.mean


class Surrogate:
    def __init__(self, rounds: list[Round]) -> None:
        cuts = [each for each in rounds if each.action.threshold is not None]
        self.density = Process(np.array([_cut_features(each.parent, each.action) for each in cuts]),
                               np.log([1 - each.state.sparsity for each in cuts]))
        self.quality = Process(np.array([_features(each.parent, each.action, each.state.sparsity) for each in rounds]),
                               np.log([each.state.value for each in rounds]))
        tokens = np.array([[1.0, each.action.finetune_tokens] for each in rounds])
        self.costs: Floats = np.linalg.lstsq(tokens, np.array([each.seconds for each in rounds]), rcond=None)[0]

    def __call__(self, parent: State, action: Action) -> tuple[State, float]:
        """(the candidate's state, seconds of the round)."""
        sparsity = action.sparsity
        if sparsity is None:
            sparsity = 1 - float(np.exp(self.density(_cut_features(parent, action))))
        sparsity = min(max(sparsity, parent.sparsity), 0.999)
        value = float(np.exp(self.quality(_features(parent, action, sparsity))))
        return State(sparsity, value), float(self.costs @ [1.0, action.finetune_tokens])


def _training(action: Action) -> tuple[float, float, float]:
    return np.log10(action.learning_rate), np.log10(action.l1_lambda), np.log2(action.finetune_tokens)


def _cut_features(parent: State, action: Action) -> Floats:
    return np.array([parent.sparsity, action.threshold, *_training(action)])


def _features(parent: State, action: Action, sparsity: float) -> Floats:
    return np.array([parent.sparsity, np.log(parent.value), np.log(1 - sparsity),
                     np.log((1 - sparsity) / (1 - parent.sparsity)), action.scope == "layer", *_training(action)])


def held_out_errors(table: Table, num_folds: int = 5) -> dict[str, float]:
    """Root mean squares over rounds of trials that were not fitted: of a round's log quality beside the spread that there is,
    of the log density by threshold, and of the log quality after a whole chain of predictions."""
    groups = [each.group for each in table.rounds]
    errors: dict[str, list[float]] = {"round": [], "density_by_threshold": [], "chain": []}
    for fitted, held in GroupKFold(num_folds).split(groups, groups=groups):
        surrogate = Surrogate([table.rounds[index] for index in fitted])
        out = {groups[index] for index in held}
        for each in (table.rounds[index] for index in held):
            state, _ = surrogate(each.parent, each.action)
            errors["round"].append(float(np.log(state.value / each.state.value)))
            if each.action.threshold is not None:
                errors["density_by_threshold"].append(float(np.log((1 - state.sparsity) / (1 - each.state.sparsity))))
        for chain in (chain for chain in table.chains if chain[0].group in out):
            state = DENSE
            for each in chain:
                state, _ = surrogate(state, each.action)
            errors["chain"].append(float(np.log(state.value / chain[-1].state.value)))
    spread = float(np.std([np.log(each.state.value) for each in table.rounds]))
    return {name: round(float(np.sqrt(np.mean(np.square(values)))), 5) for name, values in errors.items()} | {
        "spread": round(spread, 5)}
