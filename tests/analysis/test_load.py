import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from synthetic_study import EVIL, NUM_PARAMETERS, PROVENANCE, ROOT, SyntheticStudy

from analysis.load import HYPERPARAMETERS, load, metric_names
from analysis.tables import describe_config
from raysearch.study.records import TrialRecord


def test_one_row_per_trial_and_round_plus_dense(frame: pd.DataFrame) -> None:
    assert len(frame) == 1 + 3 + 5 + 1 + 3 + 1 + 3 + 1 + 1 + 1 + 2 + 2 + 1
    first = frame.iloc[0]
    assert first["key"] == ROOT
    assert first["status"] == "dense"
    assert first["trial"] is pd.NA
    assert (first["round"], first["num_nonzero"], first["sparsity"]) == (0, NUM_PARAMETERS, 0.0)
    assert frame["trial"].dtype == frame["stored_bytes"].dtype == "Int64"
    assert set(HYPERPARAMETERS) <= set(frame)


def test_numbers_of_one_row(frame: pd.DataFrame) -> None:
    row = frame[(frame["trial"] == 1) & (frame["round"] == 5)].iloc[0]
    assert row["num_nonzero"] == 1_000_000 - 400_000
    assert (row["sparsity"], row["model_sparsity"], row["action_sparsity"]) == (0.5, 0.4, 0.5)
    assert row["stored_bytes"] == 4 * 600_000 + 100_000
    assert row["selection/text/bits_per_byte"] == pytest.approx(2 + 1.2 * 0.125 - 0.05)
    assert row["report/text/bits_per_byte"] == pytest.approx(2 + 1.2 * 0.125 - 0.05 + 0.015)
    assert row["report/text/bits_per_byte_stderr"] == 0.02
    assert pd.isna(row["selection/last_word/perplexity_stderr"])
    assert row["seconds"] == 3.0
    assert row["trial_seconds"] == 62.5


def test_shared_prefix_and_duplicates_are_aliases(frame: pd.DataFrame) -> None:
    aliases = frame[frame["is_alias"]]
    assert list(zip(aliases["trial"], aliases["round"])) == [(1, 1), (1, 2), (1, 3), (6, 1)]
    both = frame[(frame["round"] == 2) & frame["trial"].isin([0, 1])]
    assert both["key"].nunique() == 1
    assert both["report/text/bits_per_byte"].nunique() == 1  # scored through trial 1, known to trial 0


def test_failed_trial_without_a_round_keeps_its_row(frame: pd.DataFrame) -> None:
    (row,) = [row for _, row in frame[frame["trial"] == 8].iterrows()]
    assert row["round"] is pd.NA
    assert pd.isna(row["key"])
    assert row["reason"] == EVIL
    assert row["learning_rate"] == 0.1
    assert frame.loc[frame["trial"] == 9, "status"].tolist() == ["failed", "failed"]


def test_threshold_mode_and_missing_report(frame: pd.DataFrame) -> None:
    row = frame[frame["trial"] == 4].iloc[0]
    assert (row["threshold"], row["action_threshold"], row["threshold_unit"]) == (0.5, 0.5, "std")
    assert pd.isna(row["action_sparsity"])
    assert pd.isna(row["target_sparsity"])
    assert pd.isna(row["report/text/bits_per_byte"])
    assert metric_names(frame, "report") == ["last_word/acc", "last_word/perplexity", "text/bits_per_byte"]


def test_attrs_survive_selection(frame: pd.DataFrame, study_directory: Path) -> None:
    part = frame[frame["trial"] == 1].sort_values("round")
    assert part.attrs == {"directory": str(study_directory.resolve()), "model": "/models/tiny-gpt",
                          "objectives": ("num_nonzero", "text/bits_per_byte"),
                          "objective": "text/bits_per_byte", "size": "num_nonzero", "device": "CPU, 2 cores",
                          "created_at": "2026-11-23T09:00:00+00:00", "speed": "", "damage": ()}


def test_no_trials_not_even_a_baseline(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    assert load(tmp_path / "study").empty
    study.dense(report=False)
    assert load(tmp_path / "study")["round"].tolist() == [0]


def test_the_device_is_where_the_rounds_ran_not_where_the_driver_did(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    head_node = PROVENANCE.model_copy(update={"device": "CPU of the head node"})
    study.ledger.write_study(study.ledger.study().model_copy(update={"provenance": head_node}))
    assert load(tmp_path / "study").attrs["device"] == "CPU of the head node"
    study.dense(report=False)
    assert load(tmp_path / "study").attrs["device"] == PROVENANCE.device


def test_all_failed(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    for number in range(3):
        study.trial(number, [0.5], status="failed", num_finished=0, reason="diverged")
    frame = load(tmp_path / "study")
    assert frame["trial"].tolist() == [pd.NA, 0, 1, 2]
    assert not frame["is_alias"].any()


def test_what_is_lost_or_strange_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    first, lost = study.trial(0, [0.3, 0.5], finetune_epochs=1.0)
    study.trial(1, [0.4])
    assert load(tmp_path / "study").attrs["damage"] == ()
    trials = tmp_path / "study" / "trials"
    for name in ("00001-old.json", "notes.json", "1.json"):
        (trials / name).write_text((trials / "00001.json").read_text())
    (study.ledger.round_directory(lost) / "record.json").unlink()
    (tmp_path / "study" / "copies" / f"{lost}.record.json").unlink()
    report = study.ledger.round_directory(ROOT) / "report.json"
    (tmp_path / "study" / "copies" / f"{ROOT}.report.json").unlink()
    report.write_text("")
    frame = load(tmp_path / "study")
    assert frame["trial"].tolist() == [pd.NA, 0, 1]
    assert frame["key"].tolist()[:2] == [ROOT, first]
    assert frame["report/text/bits_per_byte"].isna().all()
    named = "\n".join(frame.attrs["damage"])
    for name in ("00001-old.json: is no record", "notes.json: is no record", "/1.json: is no record",
                 f"{lost}/record.json: is missing, and trial 0 names it", f"{report}: not a ReportRecord"):
        assert name in named
    assert len(frame.attrs["damage"]) == 5


def test_not_a_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no study"):
        load(tmp_path)


def test_analysis_needs_neither_torch_nor_ray_nor_optuna() -> None:
    code = ("import sys, analysis.load, analysis.candidates, analysis.pick, analysis.tables, "
            "analysis.importance, analysis.plots, analysis.page\n"
            "heavy = {'torch', 'ray', 'optuna', 'deepspeed', 'transformers', 'datasets', 'sklearn'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_controls_rounds_come_last_and_are_no_trials(controlled: pd.DataFrame, frame: pd.DataFrame) -> None:
    rows = controlled[controlled["status"] == "control"]
    assert rows.index.tolist() == list(range(len(frame), len(frame) + 3))
    assert rows["trial"].isna().all()
    assert rows["schedule"].isna().all()
    assert rows["round"].tolist() == [1, 2, 3]
    assert rows["trained_tokens"].tolist() == [3000, 6000, 9000]
    assert rows["selection/text/bits_per_byte"].tolist() == pytest.approx([1.925] * 3)
    assert rows["report/text/bits_per_byte"].tolist()[-1] == pytest.approx(1.935)
    pd.testing.assert_frame_equal(controlled.head(len(frame)), frame, check_dtype=False)


def test_tokens_are_counted_from_the_dense_model_on(frame: pd.DataFrame) -> None:
    assert frame[frame["status"] == "dense"]["trained_tokens"].tolist() == [0]
    assert frame[frame["trial"] == 1]["trained_tokens"].tolist() == [1000, 2000, 3000, 4000, 5000]


def test_a_control_that_failed_in_its_first_round_keeps_its_row_and_a_trials_round_stays_the_trials(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.5], finetune_epochs=1.0)
    study.trial(1, [0.0], finetune_epochs=1.0)  # does what a control does
    study.control(report=False, num_finished=0, status="failed", reason="round 1: diverged")
    assert load(tmp_path / "study")[["status", "reason"]].iloc[-1].tolist() == ["control", "round 1: diverged"]
    study.control(report=False)
    assert load(tmp_path / "study")[["status", "is_alias"]].values.tolist()[1:] == [
        ["done", False], ["done", False], ["control", True]]


def test_a_trial_without_a_configuration_is_loaded(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.5])
    study.ledger.write_trial(study.ledger.trial(0).model_copy(update={"config": None}))
    row = load(tmp_path / "study").iloc[1]
    assert (row["trial"], row["status"], row["action_sparsity"]) == (0, "done", 0.5)
    assert pd.isna(row["schedule"])


def test_a_fork_has_a_row_for_its_own_round_and_says_from_where(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.dense()
    study.trial(0, [0.3, 0.5])
    first = study.ledger.trial(0)
    (third,) = [action.model_copy(update={"sparsity": 0.7, "finetune_tokens": 500}) for action in first.actions[:1]]
    begun = [((*first.actions, third), 2), ((third,), 0), ((third, third), 1)]
    for number, (actions, forked_at) in enumerate(begun, start=1):
        study.ledger.write_trial(TrialRecord(number=number, config=None, actions=actions, forked_at=forked_at, started_at=""))
        if number < 3:
            study.finish(number)
    frame = load(tmp_path)
    rows = frame[frame["trial"] > 0].astype(object)
    rows = rows.where(rows.notna(), None)
    assert list(zip(rows["trial"], rows["round"], rows["forked_from"], rows["trained_tokens"])) == [
        (1, 3, "trial 0 round 2", 500), (2, 1, "the dense model", 500), (3, None, None, None)]  # the last one has only begun
    assert describe_config(rows.iloc[0]) == "from trial 0 round 2 on: to 0.7, global, 500 tokens, lr 0"
    assert not frame["is_alias"].any()
