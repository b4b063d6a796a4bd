"""What a study found, in sentences with numbers, and what its choice may be worth on other items."""

import math

import pandas as pd

from analysis.candidates import (
    control_rows,
    dense,
    frontier,
    frontier_split,
    knee_of,
    loss,
    losses,
    pruned,
    quality,
    quality_stderr,
    relative_hypervolume,
    relative_hypervolume_interval,
    setting,
)
from analysis.plots import SIZE_NAMES
from analysis.tables import metric_pair, with_stderr
from raysearch.config import higher_is_better
from raysearch.units import human_bytes, human_count


def default_limit(frame: pd.DataFrame) -> str:
    """What `--max-drop` takes for 1 point of an accuracy, or 1 % of another objective of the dense baseline, at 95 %.
    ValueError without a baseline on the report split."""
    baseline, objective = dense(frame), setting(frame, "objective")
    if baseline is None or pd.isna(value := baseline[f"report/{objective}"]):
        raise ValueError("nothing can be chosen before the report split is scored: run the sweep to its end")
    limit = 1.0 if higher_is_better(objective) else float(f"{0.01 * abs(value):.3g}")
    return f"{objective}={limit:g}@95%"


def headlines(frame: pd.DataFrame) -> list[str]:
    """What the study found, in sentences with numbers (plain text)."""
    split, size, baseline = frontier_split(frame), setting(frame, "size"), dense(frame)
    made = pruned(frame)
    scored = made[quality(made, split).notna()]
    if baseline is None or scored.empty or pd.isna(baseline[f"{split}/{setting(frame, 'objective')}"]):
        return ["No candidate can be compared with the dense baseline yet."]
    trained = _scored_control(frame, split)
    sentences = [_describe_smallest(frame, smallest, words, split)
                 for words, smallest in _nearest(scored, baseline, trained, split)]
    front, (low, high) = frontier(frame), relative_hypervolume_interval(frame, split)
    interval = "" if math.isnan(low) else f"{low:.3f} to {high:.3f} on other items, at 95 %; "
    num_front = int((front["status"] != "dense").sum())
    sentences.append(f"{num_front} of {len(scored)} candidates scored on the {split} split are on the frontier, from "
                     f"sparsity {front['sparsity'].min():.2f} to {front['sparsity'].max():.2f}; {len(made)} candidates "
                     f"were made in all. Hypervolume {relative_hypervolume(frame):.3f} ({interval}relative to "
                     f"dense in size, by {SIZE_NAMES[size]}, and in quality; half the size at equal quality alone gives 0.5).")
    if (bend := knee_of(frame, split)) is not None and bend["status"] != "dense":
        sentences.append(f"The frontier bends most at trial {bend['trial']} round {bend['round']} (sparsity "
                         f"{bend['sparsity']:.2f}, {setting(frame, 'objective')} "
                         f"{with_stderr(*metric_pair(bend, setting(frame, 'objective'), split))}): smaller ones lose more for "
                         "what they save.")
    if trained is not None:
        sentences.append(_gain_of_training(frame, baseline, trained, split))
    if (sentence := _better(scored, baseline, trained, split)) is not None:
        sentences.append(sentence)
    return sentences


def _nearest(scored: pd.DataFrame, baseline: pd.Series, trained: pd.Series | None, split: str
             ) -> list[tuple[str, pd.DataFrame]]:
    """(limit in words, the smallest candidate within it) around dense and, where there is one, the dense control `trained`. The
    limit is fixed: one of standard errors would grow bolder the fewer items there are."""
    objective = setting(scored, "objective")
    words = "1 point" if higher_is_better(objective) else "1 %"
    found = []
    for name, reference in (("dense", baseline), ("the dense control", trained)):
        if reference is not None:
            limit = 0.01 if higher_is_better(objective) else 0.01 * abs(reference[f"{split}/{objective}"])
            found.append((f"{words} of {name}", _smallest(scored[loss(scored, reference, split) <= limit], split)))
    if len(found) == 2 and found[0][1]["key"].tolist() == found[1][1]["key"].tolist():
        return [(f"{words} of dense, and of the dense control", found[0][1])]
    return found


def _better(scored: pd.DataFrame, baseline: pd.Series, trained: pd.Series | None, split: str) -> str | None:
    """How many candidates are better than dense, and what that says; None where none is."""
    lost, noise = losses(scored, baseline, split)
    better = scored[lost < -noise]
    if better.empty:
        return None
    sentence = f"Better than the dense baseline by more than one standard error: {len(better)}"
    if trained is not None:
        lost, noise = losses(scored, trained, split)
        return f"{sentence}; than the dense control: {int((lost < -noise).sum())}."
    num_trained = int((better["trained_tokens"] > 0).sum())
    if num_trained:
        which = "them" if num_trained == len(better) else f"{num_trained} of them"
        sentence += (f". Fine-tuning trained {which} further than the baseline, so this says that the baseline was not trained "
                     "to its end, not that pruning helps")
    return f"{sentence}."


def _scored_control(frame: pd.DataFrame, split: str) -> pd.Series | None:
    """The dense control where it can be compared on `split`."""
    rows = control_rows(frame)
    return None if quality(rows, split).dropna().empty else rows.iloc[0]


def _gain_of_training(frame: pd.DataFrame, baseline: pd.Series, trained: pd.Series, split: str) -> str:
    objective = setting(frame, "objective")
    (lost,), (stderr,) = losses(control_rows(frame), baseline, split)
    scores = [with_stderr(*metric_pair(row, objective, split)) for row in (trained, baseline)]
    return (f"The dense control, which has the longest trial's fine-tuning and is not pruned, is at {objective} {scores[0]}, "
            f"dense at {scores[1]}: fine-tuning alone gains {with_stderr(-lost, stderr)}.")


def optimism(frame: pd.DataFrame) -> pd.DataFrame:
    """Selection against report, for the candidates that the search chose (the frontier of the selection split, where
    scored on both): `selection_loss` and `report_loss` are the losses against the dense baseline on each split, in
    the objective's unit, positive when worse; `optimism` = report_loss - selection_loss, above 0 when the selection
    split flattered the choice; `optimism_stderr` as if the splits' errors were independent."""
    rows = frontier(frame, "selection")
    rows = rows[(rows["status"] != "dense") & quality(rows, "report").notna()]
    baseline = frame[frame["status"] == "dense"]
    if baseline.empty or rows.empty:
        return rows.head(0).assign(selection_loss=[], report_loss=[], optimism=[], optimism_stderr=[])
    variance = pd.Series(0.0, index=rows.index)
    for split in ("selection", "report"):
        rows = rows.assign(**{f"{split}_loss": quality(baseline, split).iloc[0] - quality(rows, split)})
        variance += quality_stderr(rows, split).fillna(0) ** 2 + quality_stderr(baseline, split).fillna(0).iloc[0] ** 2
    return rows.assign(optimism=rows["report_loss"] - rows["selection_loss"], optimism_stderr=variance**0.5)


def _smallest(good: pd.DataFrame, split: str) -> pd.DataFrame:
    """The row of the smallest of these candidates, the better one of equal ones; none of none."""
    return good.assign(minus=-quality(good, split)).sort_values([setting(good, "size"), "minus", "key"]).head(1)


def _describe_smallest(frame: pd.DataFrame, smallest: pd.DataFrame, words: str, split: str) -> str:
    """The one row or none of `_smallest`, as within `words`, with what it loses where there is a dense control."""
    if smallest.empty:
        return f"No candidate is within {words}."
    objective = setting(frame, "objective")
    best, baseline, trained = smallest.iloc[0], frame[frame["status"] == "dense"].iloc[0], _scored_control(frame, split)
    value, reference = (with_stderr(*metric_pair(row, objective, split)) for row in (best, baseline))
    compared = ""
    if trained is not None:
        to_dense, to_control = (with_stderr(*(float(column.iloc[0]) for column in losses(smallest, row, split)))
                                for row in (baseline, trained))
        compared = (f", dense control {with_stderr(*metric_pair(trained, objective, split))}: a drop of {to_dense} against "
                    f"dense and of {to_control} against the control")
    share, stored_share = (best[name] / baseline[name] for name in ("num_nonzero", "stored_bytes"))
    return (f"By scores alone, smallest within {words}: sparsity {best['sparsity']:.2f} (trial {best['trial']} round "
            f"{best['round']}), {human_count(best['num_nonzero'])} non-zero parameters ({share:.0%} of dense), "
            f"{human_bytes(best['stored_bytes'])} stored ({stored_share:.0%}), {objective} {value}, "
            f"dense {reference}{compared}.")
