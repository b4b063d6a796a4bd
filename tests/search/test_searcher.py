"""Tune's searcher without Tune: the order of its jobs, with a real journal and ledger, and made-up rounds."""

from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher
from synthetic_study import ROOT, SyntheticStudy, metrics

from raysearch.config import TrialConfig
from raysearch.search.searcher import StudySearcher
from raysearch.trial.inputs import Inputs

INPUTS = Inputs(ROOT, 0, {}, None)


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {"schedule": "linear", "num_rounds": 2, "target_sparsity": trial.suggest_float("target_sparsity", 0.1, 0.9)}


def searcher(study: SyntheticStudy, num_trials: int, said: list[str], given: list[TrialConfig] | None = None) -> StudySearcher:
    settings = study.ledger.study().study.replaced(**{"num_trials": num_trials})
    return StudySearcher(study.ledger, settings, space, INPUTS, said.append, given)


def run_to_the_end(made: StudySearcher, study: SyntheticStudy) -> list[str]:
    """Every job, one after the other, done; what they were."""
    kinds = []
    while (job := made.suggest(str(len(kinds)))) != Searcher.FINISHED:
        assert isinstance(job, dict)
        kinds.append(job["kind"])
        if job["kind"] == "dense":
            study.dense()
        elif job["kind"] == "trial":
            keys = study.finish(job["number"], num_finished=1, status="running")
            made.on_trial_result(str(len(kinds) - 1), {"key": keys[-1]})
            study.finish(job["number"])
        else:
            study.ledger.write_report_metrics(job["key"], metrics(0.5, 0.0), {})
        made.on_trial_complete(str(len(kinds) - 1), {"done": True})
    return kinds


def test_the_baseline_then_trials_then_the_frontiers_report(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    made = searcher(study, 3, said)
    assert made.has_work()
    kinds = run_to_the_end(made, study)
    assert kinds[:4] == ["dense", "trial", "trial", "trial"]
    assert set(kinds[4:]) == {"report"}
    assert made.finished
    assert not made.has_work()
    assert [trial.status for trial in study.ledger.trials()] == ["done"] * 3
    reported = set(study.ledger.reports())
    for trial in study.ledger.trials():
        last = study.ledger.candidate(trial.keys[-1])
        recorded = made.sampler.optuna_study.trials[trial.number]
        assert recorded.state == TrialState.COMPLETE
        assert recorded.values == [last.num_nonzero, last.metrics["text/bits_per_byte"].value]
        assert last.key in reported  # smaller is worse here, so that all are on the frontier
    assert sum("round 1/2" in line for line in said) == 3


def test_a_second_searcher_finds_everything_done_and_a_longer_study_goes_on(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    run_to_the_end(searcher(study, 2, said), study)
    assert not searcher(study, 2, said).has_work()
    longer = searcher(study, 3, said)
    assert longer.has_work()
    assert run_to_the_end(longer, study)[0] == "trial"
    assert [trial.number for trial in study.ledger.trials()] == [0, 1, 2]


def test_a_trial_that_a_dead_driver_left_runs_again(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    study.dense()
    first = searcher(study, 2, said)
    left = first.suggest("0")
    again = searcher(study, 2, said)
    assert again.suggest("0") == left
    assert run_to_the_end(searcher(study, 2, said), study)[:2] == ["trial", "trial"]


def test_a_trial_whose_record_was_never_written_does_not_count(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    study.dense()
    first = searcher(study, 2, said)
    first.sampler.optuna_study.ask()  # and there the driver died
    made = searcher(study, 2, said)
    assert made.sampler.num_asked == 0
    run_to_the_end(made, study)
    assert [trial.state for trial in made.sampler.optuna_study.trials] == [
        TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert [trial.number for trial in study.ledger.trials()] == [1, 2]


def test_a_trial_whose_process_died_is_recorded_and_others_go_on(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    study.dense()
    made = searcher(study, 2, said)
    made.suggest("0")
    made.on_trial_complete("0", None, error=True)
    failed = study.ledger.trial(0)
    assert failed.status == "failed"
    assert failed.reason == "its process died twice, killed or out of memory; the log is in log_path"
    assert made.sampler.optuna_study.trials[0].state == TrialState.FAIL
    assert said[-1] == f"trial 0 failed: {failed.reason}"
    assert run_to_the_end(made, study)[0] == "trial"


def test_without_a_baseline_no_trial_runs(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    made = searcher(study, 2, said)
    assert made.suggest("0") == {"kind": "dense"}
    made.on_trial_complete("0", None, error=True)
    assert made.dense_failed
    assert made.suggest("1") == Searcher.FINISHED
    assert said[-1].startswith("dense job failed: its process died (log in ")


def test_given_trials_are_handed_out_in_their_order(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    given = [TrialConfig(target_sparsity=sparsity) for sparsity in (0.7, 0.2)]
    run_to_the_end(searcher(study, 2, said, given), study)
    assert [trial.config for trial in study.ledger.trials()] == given
    longer = [*given, TrialConfig(target_sparsity=0.4)]
    run_to_the_end(searcher(study, 3, said, longer), study)
    assert [trial.config for trial in study.ledger.trials()] == longer


def test_no_trial_begins_after_the_time_budget(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    study.dense()
    settings = study.ledger.study().study.replaced(**{"num_trials": 2, "time_budget_s": 1e-6})
    made = StudySearcher(study.ledger, settings, space, INPUTS, said.append)
    assert made.suggest("0") == Searcher.FINISHED
    assert study.ledger.trials() == []
