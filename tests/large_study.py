"""A study of many trials, written in seconds: without fsyncs, and with made-up numbers."""

import os
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution, distribution_to_json
from synthetic_study import ROOT, SyntheticStudy

from raysearch.config import TrialConfig
from raysearch.study.records import TrialRecord
from raysearch.trial.actions import resolve_actions

DISTRIBUTIONS = {"target_sparsity": FloatDistribution(0.1, 0.95), "lr": FloatDistribution(1e-5, 1e-2, log=True),
                 "schedule": CategoricalDistribution(["linear", "cubic"]), "rounds": IntDistribution(5, 5)}


def space(trial: optuna.Trial) -> dict:
    return {"target_sparsity": trial.suggest_float("target_sparsity", 0.1, 0.95), "finetune_epochs": 1.0,
            "learning_rate": trial.suggest_float("lr", 1e-5, 1e-2, log=True), "num_rounds": trial.suggest_int("rounds", 5, 5),
            "schedule": trial.suggest_categorical("schedule", ["linear", "cubic"])}


def large_study(folder: Path, num_trials: int) -> SyntheticStudy:
    """Of 5 rounds a trial; each tenth has crashed after one of them."""
    generator = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        study = SyntheticStudy(folder, epoch_tokens=1024, batch_tokens=256, context_tokens=64, num_trials=num_trials + 2)
        study.dense()
        settings = study.ledger.study().study
        for number in range(num_trials):
            config = TrialConfig(target_sparsity=float(generator.uniform(0.1, 0.95)), finetune_epochs=1.0, num_rounds=5,
                                 schedule=("linear", "cubic")[number % 2], learning_rate=float(10 ** generator.uniform(-5, -2)))
            parameters = {"target_sparsity": config.target_sparsity, "lr": config.learning_rate, "rounds": 5,
                          "schedule": config.schedule}
            study.ledger.write_trial(TrialRecord(
                number=number, config=config, actions=resolve_actions(config, settings, 10**6), parameters=parameters,
                distributions={name: distribution_to_json(each) for name, each in DISTRIBUTIONS.items()}, started_at="now"))
            crashed = {"status": "failed", "reason": "killed", "crashed": True, "num_finished": 1} if number % 10 == 9 else {}
            study.finish(number, **crashed)
    assert study.ledger.round(ROOT) is not None
    return study
