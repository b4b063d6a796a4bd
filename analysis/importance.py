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
from raysearch.config import READ_BY, WHILE_TRAINING, Action, TrialConfig
from raysearch.pruning.pareto import Floats

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
    residual, trial, varied = _varied(frame)
    rows = []
    for name, (names, levels) in varied.items():
        means = [residual[levels == level].mean() for level in range(len(names))]
        rows.append({"hyperparameter": name, "share": explained_share(residual, levels),
                     "chance": _chance(residual, levels, trial, np.random.default_rng(seed)),
                     "best_level": names[int(np.argmax(means))], "num_levels": len(names)})
    return pd.DataFrame(rows).sort_values(["share", "hyperparameter"], ascending=[False, True], ignore_index=True)


def dependence(frame: pd.DataFrame) -> pd.DataFrame:
    """How quality at equal size depends on each hyper-parameter that varies: a row per level, `hyperparameter`, `level`,
    `effect` (the mean of what is left of the rank over the level's candidates; 0.1 is ahead of 10 % more of all candidates than
    its size says), `stderr` over trials (NaN of one), `num_candidates` and `num_trials`. Marginal means: no model holds the
    other hyper-parameters fast. ValueError as `importance`."""
    residual, trial, varied = _varied(frame)
    rows = []
    for name, (names, levels) in varied.items():
        for level, text in enumerate(names):
            of_level, trials = residual[levels == level], np.unique(trial[levels == level], return_inverse=True)[1]
            effect, k = float(of_level.mean()), int(trials.max()) + 1
            apart = np.bincount(trials, weights=of_level - effect)  # candidates of one trial err together
            stderr = float(np.sqrt(apart @ apart * k / (k - 1))) / len(of_level) if k > 1 else np.nan
            rows.append({"hyperparameter": name, "level": text, "effect": effect, "stderr": stderr,
                         "num_candidates": len(of_level), "num_trials": k})
    return pd.DataFrame(rows)


def as_used(rows: pd.DataFrame) -> pd.DataFrame:
    """Those HYPERPARAMETERS of rows of a loaded frame that vary, missing where nothing depends on them; those of a fork, or of
    another trial that was given as actions, are its action's, with the epochs that its tokens are."""
    used = rows[list(HYPERPARAMETERS)].astype(object)
    epoch_tokens = (rows["finetune_tokens"].astype("float64") / rows["finetune_epochs"].replace(0.0, np.nan)).median()
    for index, row in rows[rows["action"].notna()].iterrows():
        given = Action.model_validate_json(str(row["action"])).model_dump()
        given |= {"schedule": "actions" if pd.isna(row["forked_from"]) else "fork", "target_sparsity": given["sparsity"],
                  "finetune_epochs": round(given["finetune_tokens"] / epoch_tokens, 2)}
        used.loc[index] = [given.get(name) for name in HYPERPARAMETERS]
    trained = rows["finetune_tokens"].fillna(1).gt(0) & used["finetune_epochs"].fillna(1).gt(0)
    ranks, is_owl = used["threshold"].isna(), used["budget"].eq("owl")
    needs = {name: used["criterion"].isin(criteria) for name, criteria in READ_BY.items()}
    needs |= {"threshold_unit": ~ranks, "scope": ranks, "budget": ranks, "owl_lambda": is_owl, "owl_m": is_owl,
              "temperature": used["distill_alpha"].gt(0), **dict.fromkeys(WHILE_TRAINING, trained),
              "calibration_sequences": used["calibration_sequences"].gt(0) & (is_owl | needs["calibration_sequences"])}
    for name, is_needed in needs.items():
        used[name] = used[name].where(is_needed)
    may_lack = [name for name in HYPERPARAMETERS if TrialConfig.model_fields[name].default is None]  # to have none is a value
    num_values = {name: used[name].nunique() + bool(name in may_lack and used[name].isna().any()) for name in used}
    return used[[name for name in used if num_values[name] > 1]].infer_objects()


def _varied(frame: pd.DataFrame) -> tuple[Floats, Ints, dict[str, tuple[list[str], Ints]]]:
    """(quality at equal size, trial, and by hyper-parameter that varies its levels and each candidate's) of all candidates."""
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
    varied = {str(name): _levels(column) for name, column in as_used(pool).items()}
    if not varied:
        raise ValueError("importance needs a hyper-parameter that varies, got the same values in all trials")
    return residual, trial, varied


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
    centred = values - values.mean()
    return _share(np.stack([np.bincount(levels, weights) for weights in (centred, np.ones(len(levels)))]), centred @ centred)


def _share(by_level: Floats, total: float) -> float:
    """Of values around 0, from [2, k]: their sum and number at each level, and from the sum of their squares."""
    sums, counts = by_level[:, by_level[1] > 0]
    n, k = float(counts.sum()), len(counts)
    if n <= k or total == 0:
        return 0.0
    within = total - float(np.sum(sums**2 / counts))
    return max(0.0, 1 - (within / (n - k)) / (total / (n - 1)))


def _chance(residual: Floats, levels: Ints, trial: Ints, generator: np.random.Generator) -> float:
    """95th percentile of the share when the trials swap their levels at random."""
    of_trial = np.zeros(trial.max() + 1, dtype=np.int64)
    of_trial[trial] = levels
    centred = residual - residual.mean()
    by_trial = [np.bincount(trial, weights) for weights in (centred, np.ones(len(trial)))]
    shuffles = (generator.permutation(of_trial) for _ in range(NUM_SHUFFLES))
    shares = [_share(np.stack([np.bincount(shuffled, weights) for weights in by_trial]), centred @ centred)
              for shuffled in shuffles]
    return float(np.quantile(shares, 0.95))


def number_text(number: float) -> str:
    return f"{number:.0f}" if number == round(number) else f"{number:.3g}"


def _levels(column: pd.Series) -> tuple[list[str], Ints]:
    """Names of the levels of one hyper-parameter, in their order and "not used" last, and each candidate's level."""
    used = column.dropna()
    if is_number := pd.api.types.is_numeric_dtype(used) and not pd.api.types.is_bool_dtype(used):
        column = column.astype("float64")
    if is_number and used.nunique() > MAX_LEVELS:
        bins = pd.qcut(column, MAX_LEVELS, duplicates="drop")
        spans = column.groupby(bins, observed=True).agg(["min", "max"])
        texts = {interval: f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
                 for interval, low, high in spans.itertuples()}
        column = bins.astype(object)
    else:
        texts = {value: number_text(value) if is_number else str(value) for value in sorted(used.unique())}
    names = list(dict.fromkeys(texts.values())) + ["not used"] * bool(column.isna().any())
    number = {name: index for index, name in enumerate(names)}
    return names, np.array([number[texts.get(value, "not used")] for value in column], dtype=np.int64)
