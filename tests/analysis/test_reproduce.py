"""The command that a candidate shows is the trial that made it."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import small_study
import typer
from commands import Run

from analysis.load import load
from analysis.reproduce import study_options, trial_options
from raysearch.cli import app
from raysearch.config import Study, TrialConfig
from raysearch.study.ledger import Ledger
from raysearch.trial.worker import Worker


@pytest.mark.parametrize("fields", [
    {"target_sparsity": 0.5}, {"schedule": "constant", "rate": 0.123456789012345, "num_rounds": 3},
    {"threshold": 0.5, "threshold_unit": "std", "l1_lambda": 1e-5, "finetune_epochs": 0.25},
    {"pattern": "neuron", "criterion": "l2", "scope": "layer", "uniform": True, "target_sparsity": 0.5, "distill_alpha": 0.5},
])
def test_options_are_parsed_to_the_settings(fields: dict[str, Any]) -> None:
    config = TrialConfig(**fields)
    command = typer.main.get_command(app).commands["prune"]
    given = command.make_context("prune", ["m", "--out", "o", *shlex.split(trial_options(config.model_dump()))]).params
    assert TrialConfig(**{name: given[name] for name in TrialConfig.model_fields}) == config


def test_the_report_split_has_as_many_items(study: Study) -> None:
    assert "--eval-items 6 --report-items 2 " in study_options(study.replaced(num_report_items=2))
    assert "--report-items" not in study_options(study)


def test_the_command_computes_the_same_rounds(study: Study, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              run: Run) -> None:
    small_study.sweep(tmp_path / "study", study.replaced(num_trials=1), worker, monkeypatch, lambda line: None)
    frame, ledger = load(tmp_path / "study"), Ledger.open(tmp_path / "study")
    command = f"{study_options(ledger.study().study)} {trial_options(frame[frame['trial'] == 0].iloc[0])} --out again"
    code, _, err = run(*shlex.split(command)[1:])
    assert code == 0, err
    assert Ledger.open(tmp_path / "again").trial(0).keys == ledger.trial(0).keys


def test_every_setting_of_a_trial_is_an_option_of_prune() -> None:
    command = typer.main.get_command(app).commands["prune"]
    assert set(TrialConfig.model_fields) <= {parameter.name for parameter in command.params}
