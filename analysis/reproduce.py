"""`raysearch prune`, by which one trial of a study runs again in one process: the same rounds, under the same keys."""

import shlex

import pandas as pd

from analysis.tables import Row
from raysearch.config import Study, TrialConfig

NAMES = {"target_sparsity": "sparsity", "num_rounds": "rounds", "num_items": "eval-items",
         "num_report_items": "report-items"}
"""Options that are not called as the setting that they give."""


def study_options(study: Study) -> str:
    """What is common to all trials: the command with the model and the settings that its rounds depend on."""
    data, evaluation = study.data, study.evaluation
    given = {"corpus": data.corpus, "text_field": data.text_field, "tasks": ",".join(evaluation.tasks),
             "data_dir": evaluation.data_dir, "num_items": evaluation.num_items,
             "num_report_items": evaluation.num_report_items, "context_tokens": data.context_tokens,
             "epoch_tokens": data.epoch_tokens, **study.training.model_dump(), "prunable": study.model.prunable,
             "dtype": study.model.dtype, "seed": data.seed}
    return f"raysearch prune {shlex.quote(study.model.path)} {_options(given)}"


def trial_options(row: Row) -> str:
    """What a row of a loaded frame adds to it: the trial's settings but for defaults; "" where it was given as actions."""
    fields = TrialConfig.model_fields
    return _options({name: row[name] for name in fields if pd.notna(row[name]) and row[name] != fields[name].default})


def _options(given: dict[str, object]) -> str:
    parts = []
    for name, value in given.items():
        option = f"--{NAMES.get(name, name).replace('_', '-')}"
        if value is True:
            parts.append(option)
        elif value is not None and value is not False:
            parts.append(f"{option} {shlex.quote(str(value))}")
    return " ".join(parts)
