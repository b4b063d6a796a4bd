"""Which rows are candidates, how good they are, and which are on the frontier."""

import itertools
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
from synthetic_study import NUM_PARAMETERS, ROOT, SyntheticStudy

from analysis.candidates import (
    candidates,
    control,
    control_rows,
    dense,
    front_probability,
    frontier,
    frontier_split,
    losses,
    pruned,
    quality,
    quality_stderr,
    relative_hypervolume,
    setting,
)
from analysis.load import load
from raysearch.study.ledger import Ledger


def test_candidates_have_a_model_of_their_own(frame: pd.DataFrame) -> None:
    found = candidates(frame)
    assert found["key"].is_unique
    assert set(found["key"]) == set(frame["key"].dropna())
    assert ROOT in set(found["key"])


def test_the_baseline_or_none(frame: pd.DataFrame, tmp_path: Path) -> None:
    assert dense(frame)["num_nonzero"] == NUM_PARAMETERS
    SyntheticStudy(tmp_path)
    assert dense(load(tmp_path)) is None


def test_quality_is_better_when_it_is_higher(frame: pd.DataFrame, tmp_path: Path) -> None:
    bits = frame["selection/text/bits_per_byte"]
    assert quality(frame, "selection").dropna().tolist() == (-bits.dropna()).tolist()
    assert quality_stderr(frame, "selection").dropna().unique().tolist() == [0.02]
    study = SyntheticStudy(tmp_path, objective="last_word/acc")
    study.dense()
    assert quality(load(tmp_path), "selection").tolist() == [0.6]


def test_a_raced_candidate_has_no_quality(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.dense()
    (key,) = study.trial(0, [0.5])
    record = study.ledger.candidate(key).model_copy(update={"dominated_by": ROOT})
    (study.ledger.round_directory(key) / "record.json").write_text(record.model_dump_json())
    frame = load(tmp_path)
    assert math.isnan(quality(frame, "selection").iloc[1])
    assert frontier(frame, "selection")["key"].tolist() == [ROOT]


def test_the_frontier_is_what_no_other_beats(frame: pd.DataFrame) -> None:
    assert frontier_split(frame) == "report"
    for split, size in itertools.product(("selection", "report"), ("num_nonzero", "stored_bytes")):
        found = frontier(frame, split, size)
        pool = candidates(frame).assign(quality=quality(frame, split)).dropna(subset="quality")
        wanted = [row.key for row in pool.itertuples() if not any(
            (getattr(other, size) <= getattr(row, size) and other.quality >= row.quality)
            and (getattr(other, size) < getattr(row, size) or other.quality > row.quality) for other in pool.itertuples())]
        assert set(found["key"]) == set(wanted)
        assert found[size].is_monotonic_increasing


def test_a_place_on_the_frontier_is_as_sure_as_the_items_make_it(frame: pd.DataFrame, study_directory: Path) -> None:
    share = front_probability(frame, "report")
    scored = quality(candidates(frame), "report").dropna()
    assert share.index.tolist() == scored.index.tolist()
    assert share[dense(frame).name] < 0.5  # candidates beat it by more than the items' noise
    smallest = frontier(frame, "report").index[0]
    assert share[smallest] == 1.0
    assert share.between(0, 1).all()
    shutil.copytree(study_directory, study_directory.parent / "damaged")
    damaged = load(study_directory.parent / "damaged")
    path = Ledger.open(damaged.attrs["directory"]).items_path(frame["key"][smallest], "report")
    path.write_bytes(b"PK damaged")
    without = front_probability(damaged, "report")
    assert without.isna().sum() == 1
    assert math.isnan(without[smallest])
    path.unlink()
    assert math.isnan(front_probability(damaged, "report")[smallest])


def test_the_selection_split_until_a_candidate_is_scored_on_the_other(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.dense(report=True)
    study.trial(0, [0.5])
    assert frontier_split(load(tmp_path)) == "selection"
    study.trial(1, [0.6], report=True)
    assert frontier_split(load(tmp_path)) == "report"


def test_half_the_size_at_equal_quality_is_half_a_hypervolume(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.dense(report=False)
    assert relative_hypervolume(load(tmp_path)) == pytest.approx(0.0)
    study.trial(0, [0.625])  # half of all parameters, at 2 + 1.2 * 0.625**3 bits where dense has 2
    worse = 2 / (2 + 1.2 * 0.625**3)
    assert relative_hypervolume(load(tmp_path)) == pytest.approx(0.5 * worse)


def test_no_baseline_no_hypervolume(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.trial(0, [0.5])
    assert math.isnan(relative_hypervolume(load(tmp_path)))


def test_lost_attrs_are_one_sentence(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"frame must carry attrs\['objective'\].*copy attrs after a concat or merge"):
        setting(pd.DataFrame(), "objective")
    assert setting(frame, "size") == "num_nonzero"


def test_a_control_is_no_candidate(controlled: pd.DataFrame, frame: pd.DataFrame) -> None:
    assert control(frame) is None
    assert control_rows(frame).empty
    assert (control(controlled)["round"], control(controlled)["trained_tokens"]) == (3, 9000)
    assert candidates(controlled)["key"].tolist() == candidates(frame)["key"].tolist()
    assert pruned(frame)["key"].tolist() == candidates(frame)["key"].tolist()[1:]
    for split in ("selection", "report"):
        assert frontier(controlled, split)["key"].tolist() == frontier(frame, split)["key"].tolist()
        assert relative_hypervolume(controlled, split) == relative_hypervolume(frame, split)


def test_the_control_is_that_of_the_longest_trial_or_none(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.dense()
    study.trial(0, [0.2, 0.4], finetune_epochs=1.0)
    study.control(report=False, num_finished=1, status="running")
    assert control(load(tmp_path)) is None  # trained half as long
    first = study.control()
    assert frontier_split(load(tmp_path)) == "selection"  # the control alone is scored on the other
    assert control(load(tmp_path))["key"] == first[-1]
    study.trial(1, [0.2, 0.4, 0.6], finetune_epochs=1.0)
    assert control(load(tmp_path)) is None  # a longer trial has outgrown it
    second = study.control()
    assert control(load(tmp_path).sample(frac=1, random_state=1))["key"] == second[-1]


def test_losses_by_hand(controlled: pd.DataFrame) -> None:
    rows = controlled[controlled["trial"] == 5].head(1)  # s .4, e 2: 2 + 1.2 * .064 - .2 / 3 + .015
    value = 2 + 1.2 * 0.064 - 0.2 / 3 + 0.015
    for reference, expected in ((dense(controlled), value - 2.01), (control(controlled), value - 1.935)):
        (loss,), (stderr,) = losses(rows, reference, "report")
        assert (loss, stderr) == pytest.approx((expected, 0.02 * math.sqrt(2)))
