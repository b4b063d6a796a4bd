"""How much each hyper-parameter matters for quality at equal size.

n = number of candidates. Method: rank the objective (selection split, all candidates), take out a cubic in the rank of
the size by least squares, and ask which share of the remaining variance the levels of one hyper-parameter explain
(adjusted eta squared, Fisher 1925; that is 0 on average where it has no effect). A number with many values is cut into
at most four equally filled levels; "not used" is a level of its own. Candidates of one trial share their
hyper-parameters, so chance is measured by reshuffling whole trials.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.candidates import pruned, quality, setting
from analysis.load import HYPERPARAMETERS

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MIN_CANDIDATES = 8
MIN_TRIALS = 4
NUM_SHUFFLES = 400
MAX_LEVELS = 4
ROUNDING = 1e-9
"""Of a rank in [0, 1]: less is the rounding of the fit, 3e-15 where all qualities are equal, and no effect of anything."""


def importance(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """One row per hyper-parameter that varies, most important first: `hyperparameter`, `share` in [0, 1], `chance`
    (the 95th percentile of the share when trials are reshuffled: below it nothing was shown), `best_level`,
    `num_levels`. Shares of hyper-parameters that vary together count the same effect twice and do not add up to 1.

    ValueError when there is too little to say."""
    pool = pruned(frame)
    pool = pool[quality(pool, "selection").notna()]
    num_trials = pool["trial"].nunique()
    if len(pool) < MIN_CANDIDATES or num_trials < MIN_TRIALS:
        raise ValueError(f"importance needs at least {MIN_CANDIDATES} candidates of {MIN_TRIALS} trials, "
                         f"got {len(pool)} of {num_trials}")
    residual = quality_at_equal_size(pool[setting(frame, "size")].to_numpy(dtype=float),
                                     quality(pool, "selection").to_numpy())
    if not residual.any():
        raise ValueError("importance needs candidates whose quality differs at equal size, got none that do")
    trial = pool["trial"].astype("category").cat.codes.to_numpy().astype(np.int64)
    rows = []
    tuned = pool["finetune_epochs"] > 0
    used = {"threshold_unit": pool["threshold"].notna(), "learning_rate": tuned, "l1_lambda": tuned}
    for name in HYPERPARAMETERS:
        names, levels = _levels(pool[name].where(used[name]) if name in used else pool[name])
        if len(names) < 2:
            continue
        means = [residual[levels == level].mean() for level in range(len(names))]
        rows.append({"hyperparameter": name, "share": explained_share(residual, levels),
                     "chance": _chance(residual, levels, trial, np.random.default_rng(seed)),
                     "best_level": names[int(np.argmax(means))], "num_levels": len(names)})
    if not rows:
        raise ValueError("importance needs a hyper-parameter that varies, got the same values in all trials")
    return pd.DataFrame(rows).sort_values(["share", "hyperparameter"], ascending=[False, True], ignore_index=True)


def quality_at_equal_size(size: npt.ArrayLike, quality: npt.ArrayLike) -> Floats:
    """(n,), (n,) -> (n,): rank of the quality in [0, 1] minus its least-squares cubic in the rank of the size."""
    x, y = (pd.Series(np.asarray(values, dtype=float)).rank(pct=True).to_numpy() for values in (size, quality))
    powers = np.vander(x - x.mean(), 4)  # (n, 4)
    fitted = powers @ np.linalg.lstsq(powers, y, rcond=None)[0]
    residual = np.asarray(y - fitted, dtype=np.float64)
    residual[np.abs(residual) < ROUNDING] = 0.0
    return residual


def explained_share(values: Floats, levels: Ints) -> float:
    """Adjusted eta squared, 1 - (SS_within / (n - k)) / (SS_total / (n - 1)), cut off at 0; k = number of levels."""
    counts = np.bincount(levels)
    n, k = len(values), np.count_nonzero(counts)
    total = float(np.sum((values - values.mean()) ** 2))
    if n <= k or total == 0:
        return 0.0
    means = np.bincount(levels, weights=values) / np.maximum(counts, 1)
    within = float(np.sum((values - means[levels]) ** 2))
    return max(0.0, 1 - (within / (n - k)) / (total / (n - 1)))


def _chance(residual: Floats, levels: Ints, trial: Ints, generator: np.random.Generator) -> float:
    """95th percentile of the share when the trials swap their levels at random."""
    of_trial = np.zeros(trial.max() + 1, dtype=np.int64)
    of_trial[trial] = levels
    shares = [explained_share(residual, generator.permutation(of_trial)[trial]) for _ in range(NUM_SHUFFLES)]
    return float(np.quantile(shares, 0.95))


def _levels(column: pd.Series) -> tuple[list[str], Ints]:
    """Names of the levels of one hyper-parameter, and each candidate's level."""
    used = column.dropna()
    if pd.api.types.is_numeric_dtype(column) and used.nunique() > MAX_LEVELS:
        numbers = column.astype("float64")
        bins = pd.qcut(numbers, MAX_LEVELS, duplicates="drop")
        spans = numbers.groupby(bins, observed=True).agg(["min", "max"])
        names = {index: f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
                 for index, low, high in spans.itertuples()}
        text = bins.astype(object).map(names)
    elif pd.api.types.is_numeric_dtype(column):
        text = column.map("{:g}".format, na_action="ignore")
    else:
        text = column
    codes, levels = pd.factorize(text.astype(object).where(column.notna(), "not used"), sort=True)
    return [str(level) for level in levels], codes.astype(np.int64)
