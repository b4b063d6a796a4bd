from pathlib import Path

import pandas as pd
import pytest
from synthetic_study import SyntheticStudy

from analysis.findings import headlines, optimism
from analysis.load import load


def test_headlines(frame: pd.DataFrame) -> None:
    assert headlines(frame) == [
        "By scores alone, smallest within 1 % of dense: sparsity 0.40 (trial 5 round 1), 680k non-zero parameters (68% of "
        "dense), 2.82 "
        "MB stored (70%), text/bits_per_byte 2.025 ± 0.020, dense 2.010 ± 0.020.",
        "9 of 12 candidates scored on the report split are on the frontier, from sparsity 0.10 to 0.78; 19 candidates "
        "were made in all. Hypervolume 0.597 (0.595 to 0.599 on other items, at 95 %; relative to dense in size, by non-zero "
        "parameters, and in quality; half the size at equal quality alone gives 0.5).",
        "The frontier bends most at trial 3 round 2 (sparsity 0.55, text/bits_per_byte 2.140 ± 0.020): smaller ones lose more "
        "for what they save.",
        "Better than the dense baseline by more than one standard error: 4. Fine-tuning trained them further than the "
        "baseline, so this says that the baseline was not trained to its end, not that pruning helps."]


def test_headlines_compare_with_the_control(controlled: pd.DataFrame) -> None:
    sentences = headlines(controlled)
    assert sentences[0] == (
        "By scores alone, smallest within 1 % of dense: sparsity 0.40 (trial 5 round 1), 680k non-zero parameters (68% of "
        "dense), 2.82 MB stored (70%), text/bits_per_byte 2.025 ± 0.020, dense 2.010 ± 0.020, dense control 1.935 ± 0.020: a "
        "drop of 0.015 ± 0.006 against dense and of 0.090 ± 0.009 against the control.")
    assert sentences[1] == "No candidate is within 1 % of the dense control."
    assert sentences[-2] == (
        "The dense control, which has the longest trial's fine-tuning and is not pruned, is at text/bits_per_byte 1.935 ± "
        "0.020, dense at 2.010 ± 0.020: fine-tuning alone gains 0.075 ± 0.008.")
    assert sentences[-1] == "Better than the dense baseline by more than one standard error: 4; than the dense control: 0."
    assert not any("trained them further" in sentence for sentence in sentences)


def test_one_sentence_where_dense_and_control_have_the_same_neighbour(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.2, 0.8], report=True, finetune_epochs=1.0)
    study.control()
    sentences = headlines(load(tmp_path / "study"))
    assert sentences[0].startswith("By scores alone, smallest within 1 % of dense, and of the dense control: sparsity 0.20")
    assert sum("control: sparsity" in sentence for sentence in sentences) == 1


def test_what_was_not_fine_tuned_is_not_said_to_be_trained_further(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    (key,) = study.trial(0, [0.1], report=True)
    frame = load(tmp_path / "study")
    frame.loc[frame["key"] == key, "report/text/bits_per_byte"] = 1.5
    assert headlines(frame)[-1] == "Better than the dense baseline by more than one standard error: 1."
    study.trial(1, [0.2], report=True, finetune_epochs=1.0)
    frame = load(tmp_path / "study")
    frame.loc[frame["status"] != "dense", "report/text/bits_per_byte"] = 1.5
    assert "error: 2. Fine-tuning trained 1 of them further than the baseline" in headlines(frame)[-1]


def test_headlines_for_an_accuracy(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study", objectives=("num_nonzero", "last_word/acc"))
    study.dense()
    study.trial(0, [0.1, 0.3, 0.8], report=True)
    sentences = headlines(load(tmp_path / "study"))
    assert sentences[0].startswith("By scores alone, smallest within 1 point of dense: sparsity 0.10")


def test_optimism_by_hand(frame: pd.DataFrame) -> None:
    without_dense = frame[frame["status"] != "dense"]
    assert optimism(without_dense).empty
    table = optimism(frame)
    # both splits follow one rule, but report adds 0.015 to candidates and 0.01 to dense: optimism is 0.005
    assert table["optimism"].tolist() == pytest.approx([0.005] * len(table))
    assert table["optimism_stderr"].tolist() == pytest.approx([0.04] * len(table))  # sqrt of 4 * 0.02^2
    row = table[(table["trial"] == 1) & (table["round"] == 5)].iloc[0]
    assert row["selection_loss"] == pytest.approx(1.2 * 0.125 - 0.05)
