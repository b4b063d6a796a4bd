"""Tune's searcher without Tune: the order of its jobs, with a real journal and ledger, and made-up rounds."""

import gc
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from faults import refusing
from large_study import large_study
from large_study import space as large_space
from optuna.trial import TrialState
from ray.tune.search import Searcher
from synthetic_study import ROOT, SyntheticStudy, metrics

from raysearch.config import TrialConfig
from raysearch.search.sampler import NUM_WHOLE
from raysearch.search.searcher import StudySearcher
from raysearch.status import describe_status, study_status
from raysearch.study.damage import damaged_line
from raysearch.study.ledger import Ledger
from raysearch.study.records import NUM_POOR, gives_little
from raysearch.trial.inputs import Inputs

INPUTS = Inputs(ROOT, 0, {}, None)
TRAINS = Inputs(ROOT, 10**6, {}, None)


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {"schedule": "linear", "num_rounds": 2, "target_sparsity": trial.suggest_float("target_sparsity", 0.1, 0.9)}


def searcher(study: SyntheticStudy, num_trials: int, said: list[str], given: list[TrialConfig] | None = None,
             **changes: Any) -> StudySearcher:
    settings = study.ledger.study().study.replaced(**{"num_trials": num_trials, **changes})
    inputs = TRAINS if any(config.finetune_epochs for config in given or []) else INPUTS
    return StudySearcher(study.ledger, settings, space, inputs, said.append, given)


def given(*num_rounds: int) -> list[TrialConfig]:
    """Trials of so many rounds, each of 1 epoch of 1024 tokens (`epoch_tokens` of `trained`)."""
    return [TrialConfig(schedule="linear", target_sparsity=0.1 * (number + 2), num_rounds=rounds, finetune_epochs=1.0)
            for number, rounds in enumerate(num_rounds)]


def trained(folder: Path, **settings: Any) -> SyntheticStudy:
    return SyntheticStudy(folder, epoch_tokens=1024, batch_tokens=256, context_tokens=64, **settings)


def run_to_the_end(made: StudySearcher, study: SyntheticStudy) -> list[str]:
    """Every job, one after the other, done; what they were."""
    kinds = []
    while (job := made.suggest(str(len(kinds)))) != Searcher.FINISHED:
        assert isinstance(job, dict)
        kinds.append(job["kind"])
        if job["kind"] == "dense":
            study.dense()
        elif job["kind"] in ("trial", "control"):
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
    reported = set(study.ledger.report_records())
    for trial in study.ledger.trials():
        last = study.ledger.candidate(trial.keys[-1])
        recorded = made.sampler.journal.trials[trial.number]
        assert recorded.state == TrialState.COMPLETE
        assert recorded.values == [last.num_nonzero, last.metrics["text/bits_per_byte"].value]
        assert last.key in reported  # smaller is worse here, so that all are on the frontier
    assert sum("round 1/2" in line for line in said) == 3


def test_nothing_runs_beside_the_job_that_times_models(tmp_path: Path) -> None:
    asked = {"objectives": ("predicted_ms", "text/bits_per_byte")}
    for name, settings in (("asks", asked), ("not", {})):
        study = SyntheticStudy(tmp_path / name, **settings)
        made = searcher(study, 3, [])
        assert made.suggest("a") == {"kind": "dense"}
        second = made.suggest("b")
        assert (second is None) == (name == "asks")
        study.dense()
        made.on_trial_complete("a", {"done": True})
        assert made.suggest("c")["kind"] == "trial"
    again = SyntheticStudy(tmp_path / "asks", **asked)
    assert searcher(again, 3, []).suggest("a") == {"kind": "dense"}  # no table was written


def test_a_space_that_fails_late_fails_its_trial_and_never_the_sweep(tmp_path: Path) -> None:
    for num_failures, states in ((1, ["done", "failed", "done"]), (9, ["done", "failed", "failed", "failed"])):
        failing = range(1, 1 + num_failures)
        study, said = SyntheticStudy(tmp_path / f"study {num_failures}"), []
        made = searcher(study, 3 if num_failures == 1 else 7, said)
        made.sampler.space = lambda trial: {}["x"] if trial.number in failing else space(trial)  # noqa: B023
        assert "report" in run_to_the_end(made, study)
        trials = study.ledger.trials()
        assert [trial.status for trial in trials] == states
        assert "KeyError: 'x'; mend it" in trials[1].reason
        assert sum("trial 1 failed: space(trial): " in line for line in said) == 1
        assert any("the space failed 3 times in a row" in line for line in said) == (num_failures > 3)
    assert searcher(study, 7, said).has_work()  # the same command asks again


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
    first.sampler.journal.ask()  # and there the driver died
    made = searcher(study, 2, said)
    assert made.sampler.num_asked == 0
    run_to_the_end(made, study)
    assert [trial.state for trial in made.sampler.journal.trials] == [
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
    assert made.sampler.journal.trials[0].state == TrialState.FAIL
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


def test_no_trial_begins_once_rounds_took_the_gpu_hours(tmp_path: Path) -> None:
    """3 s a round on two GPUs: the baseline and two trials of two rounds are 30 GPU-seconds."""
    study, said = SyntheticStudy(tmp_path / "study", gpus_per_rank=2.0), []
    made = searcher(study, 9, said, gpu_hours=29 / 3600)
    assert run_to_the_end(made, study)[:4] == ["dense", "trial", "trial", "report"]
    assert len(study.ledger.trials()) == 2
    assert [line for line in said if "GPU-hours" in line] == [
        "no further trial begins: the study's rounds took 0.00833 GPU-hours of 0.00805556"]
    assert not searcher(study, 9, said, gpu_hours=29 / 3600).has_work()  # so the same command starts no Ray to say it again
    again = searcher(study, 9, [], gpu_hours=31 / 3600)  # what was spent counts in the next sweep
    assert run_to_the_end(again, study).count("trial") == 1


def test_no_trial_begins_once_the_model_expects_too_little_of_a_gpu_hour(tmp_path: Path) -> None:
    """A round takes 3 s of two GPUs."""
    study, said = SyntheticStudy(tmp_path / "study", gpus_per_rank=2.0), []
    assert run_to_the_end(searcher(study, 40, said, min_gain_per_gpu_hour=0.6), study).count("trial") < 40
    trials = study.ledger.trials()
    gains = [trial.gain_per_gpu_hour for trial in trials]
    assert gains[:NUM_WHOLE] == [None] * NUM_WHOLE
    assert max(gains[-NUM_POOR:]) < 0.6 <= gains[-NUM_POOR - 1]
    (line,) = (line for line in said if "hypervolume" in line)
    assert line == (f"no further trial is asked for: each of the last {NUM_POOR} was expected to add less than 0.6 of the "
                    f"frontier's hypervolume for a GPU-hour (at most {max(gains[-NUM_POOR:]):.3g})")
    again, told = searcher(study, 40, said, min_gain_per_gpu_hour=0.6), len(said)
    assert not again.has_work()  # nothing starts Ray to say it
    assert "trial" not in run_to_the_end(again, study)  # as before it was stopped
    assert said[told:] == [line]
    study.ledger.write_study(study.ledger.study().model_copy(update={"study": again.study}))  # as a sweep attaches
    assert f"ended       {line.partition(': ')[2]}\n" in describe_status(study_status(study.ledger.directory))
    assert "trial" in run_to_the_end(searcher(study, len(trials) + 1, said, min_gain_per_gpu_hour=0.05), study)


def test_what_no_model_expects_is_no_little_gain() -> None:
    poor = [0.5] * NUM_POOR
    assert gives_little(poor, 0.6).endswith("(at most 0.5)")
    for gains, least in ((poor, 0.5), (poor, None), (poor[1:], 0.6), ([*poor, None], 0.6), ([*poor, 0.7], 0.6)):
        assert gives_little(gains, least) == ""
    assert gives_little([None, 0.7, *poor], 0.6)


def test_a_control_of_the_longest_trial_comes_before_the_report_and_the_search_never_hears_of_it(tmp_path: Path) -> None:
    study, said = trained(tmp_path / "study"), []
    made = searcher(study, 3, said, given(2, 3, 3))
    kinds = run_to_the_end(made, study)
    assert kinds[:5] == ["dense", "trial", "trial", "trial", "control"]
    assert set(kinds[5:]) == {"report"}
    (control,) = study.ledger.controls()
    assert (control.number, control.status) == (-2, "done")
    assert [(action.sparsity, action.finetune_tokens, action.data_start_tokens) for action in control.actions] == [
        (0.0, 1024, 0), (0.0, 1024, 1024), (0.0, 1024, 2048)]
    assert "control round 1/3: sparsity 0.000 text/bits_per_byte" in "".join(said)
    assert sum("report split, dense control: sparsity 0.000" in line for line in said) == 1
    assert [trial.number for trial in made.sampler.journal.trials] == [0, 1, 2]
    reported = set(study.ledger.report_records())
    assert control.keys[-1] in reported
    assert not reported & set(control.keys[:-1])  # no round of the control is on the frontier
    assert not searcher(study, 3, said, given(2, 3, 3)).has_work()
    assert run_to_the_end(searcher(study, 4, said, given(2, 3, 3, 3)), study).count("control") == 0  # none is longer
    assert run_to_the_end(searcher(study, 5, said, given(2, 3, 3, 3, 4)), study)[:2] == ["trial", "control"]
    assert [len(control.actions) for control in study.ledger.controls()] == [3, 4]


def test_no_control_where_it_is_off_or_nothing_trains(tmp_path: Path) -> None:
    study, said = trained(tmp_path / "study"), []
    assert "control" not in run_to_the_end(searcher(study, 2, said, given(1, 2), dense_control=False), study)
    assert searcher(study, 2, said, given(1, 2)).has_work()
    untrained = SyntheticStudy(tmp_path / "untrained")
    assert "control" not in run_to_the_end(searcher(untrained, 2, said), untrained)


def test_a_killed_control_goes_on_and_a_failed_one_costs_a_line(tmp_path: Path) -> None:
    study, said = trained(tmp_path / "study"), []
    study.dense()
    for job in ("0", "1"):
        first = searcher(study, 2, said, given(1, 2))
        assert first.suggest(job)["kind"] == "trial"
        study.finish(int(job))
        first.on_trial_complete(job, {"done": True})
    left = first.suggest("2")
    assert (left["kind"], left["number"]) == ("control", -2)
    study.finish(-2, num_finished=1, status="running")  # and there the driver died
    again = searcher(study, 2, said, given(1, 2))
    assert again.has_work()
    assert again.suggest("0") == left
    assert len(study.ledger.trial(-2).keys) == 1
    again.on_trial_complete("0", None, error=True)
    failed = study.ledger.trial(-2)
    assert (failed.status, said[-1]) == ("failed", f"control failed: {failed.reason}")
    assert set(run_to_the_end(again, study)) == {"report"}
    assert [trial.status for trial in study.ledger.trials()] == ["done", "done"]
    assert searcher(study, 2, said, given(1, 2)).has_work()
    assert run_to_the_end(searcher(study, 2, said, given(1, 2)), study) == ["control", "report"]
    assert [control.status for control in study.ledger.controls()] == ["done"]


def test_no_control_begins_after_the_time_budget(tmp_path: Path) -> None:
    study, said = trained(tmp_path / "study"), []
    study.dense()
    made = searcher(study, 1, said, given(2), time_budget_s=1000.0)
    made.suggest("0")
    study.finish(0)
    made.on_trial_complete("0", {"done": True})
    made._deadline = 0.0  # long ago
    assert set(run_to_the_end(made, study)) == {"report"}
    (line,) = [line for line in said if line.startswith("no dense control: the time is up")]
    assert study.ledger.controls() == []
    assert searcher(study, 1, said, given(2)).has_work()


# ---- what is refused, and how much is read ----


@pytest.mark.usefixtures("soon")
def test_a_disk_that_is_full_at_the_journal_is_one_sentence_and_the_next_sweep_counts_rightly(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    path = study.ledger.directory / "journal.log"
    with refusing():  # files above 20 kB: the journal's is the first
        made = searcher(study, 40, said)
        kinds = run_to_the_end(made, study)
    assert not made.finished
    assert str(made.refusal).startswith(f"{path}: cannot be written, twice 0.5 s apart (File too large)")
    assert str(made.refusal).endswith("free or mend the storage, and the same sweep goes on")
    assert damaged_line(path.read_bytes()) is None  # not half a change is kept
    before = {trial.number: trial for trial in study.ledger.trials() if trial.status == "done"}
    assert 5 < len(before) < 40
    assert kinds.count("trial") >= len(before)
    said.clear()
    made = searcher(study, 40, said)
    run_to_the_end(made, study)
    assert made.finished
    assert made.progress.count == {"running": 0, "done": 40, "stopped": 0, "failed": 0}
    assert all(study.ledger.trial(number) == trial for number, trial in before.items())
    assert [trial.number for trial in made.sampler.journal.trials if trial.state == TrialState.COMPLETE] == [
        trial.number for trial in study.ledger.trials()]


def test_a_trial_is_never_written_over_by_another_one(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    study.dense()
    made = searcher(study, 3, said)
    study.trial(0, [0.5])  # after the journal was compared with the records
    before = study.ledger.trial_path(0).read_bytes()
    assert made.suggest("0") == Searcher.FINISHED
    assert "00000.json: is there already, and a trial is never written over by another one" in str(made.refusal)
    assert study.ledger.trial_path(0).read_bytes() == before
    again = searcher(study, 3, said)
    run_to_the_end(again, study)
    assert study.ledger.trial_path(0).read_bytes() == before


def test_the_report_phase_reads_each_record_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    run_to_the_end(searcher(study, 4, said), study)
    for path in [*study.ledger.directory.rglob("*report*")]:
        path.unlink()
    study.ledger.write_report_metrics(ROOT, metrics(0.0, 0.0), {})
    read: list[Path] = []
    original = Ledger.candidate_of
    made = searcher(study, 4, said)
    monkeypatch.setattr(Ledger, "candidate_of", lambda ledger, path: (read.append(path), original(ledger, path))[1])
    monkeypatch.setattr(made.progress, "ended", lambda job, error: None)  # whose lines name the candidate
    assert made.has_work()
    assert set(run_to_the_end(made, study)) == {"report"}
    assert max(Counter(read).values()) == 1
    assert len(read) == 1 + 2 * 4


def test_a_study_of_many_trials_is_ready_soon(tmp_path: Path) -> None:
    """In processor time, which other work does not lengthen. 2,000 trials of 5 rounds, a tenth of them crashed, take four times
    as long (docs/log.md)."""
    study = large_study(tmp_path / "study", 500)
    inputs = Inputs(ROOT, 10**6, {}, None)
    settings = study.ledger.study().study

    def made() -> StudySearcher:
        return StudySearcher(study.ledger, settings, large_space, inputs, lambda line: None)

    made()  # makes the journal
    gc.collect()
    gc.freeze()  # or the collector would go through what the tests before it have left, again and again
    try:
        started = time.process_time()
        ready = made()
        assert time.process_time() - started < 1.5  # it reads every round, from which a fork may start
        started = time.process_time()
        asked = ready.sampler.ask()
        assert time.process_time() - started < 0.5  # with a model of 400 rounds fitted for the first time
    finally:
        gc.unfreeze()
    assert asked.number == 500
    assert ready.sampler.num_asked == 501


def test_a_space_that_is_used_up_ends_the_study_with_a_line(tmp_path: Path) -> None:
    study, said = SyntheticStudy(tmp_path / "study"), []
    made = searcher(study, 9, said)
    made.sampler.space = lambda trial: {"target_sparsity": trial.suggest_categorical("target_sparsity", [0.2, 0.4, 0.6])}
    kinds = run_to_the_end(made, study)
    assert kinds.count("trial") == 3
    assert sum("no further trial is asked for: the space proposes nothing that its 3 trials did not try" in line
               for line in said) == 1
    assert made.finished
