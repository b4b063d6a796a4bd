"""Which rows are candidates, how good they are, and which are on the frontier."""

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
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
    knee_of,
    losses,
    pruned,
    quality,
    quality_stderr,
    relative_hypervolume,
    relative_hypervolume_interval,
    setting,
)
from analysis.compare import compare
from analysis.load import load
from raysearch.study.items import write_items
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
    study = SyntheticStudy(tmp_path, objectives=("num_nonzero", "last_word/acc"))
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


def test_candidates_far_behind_the_frontier_need_no_items(frame: pd.DataFrame, study_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(study_directory, tmp_path / "study")
    study = load(tmp_path / "study")
    column = "selection/text/bits_per_byte_stderr"
    sure = study.assign(**{column: study[column] / 20})
    share = front_probability(sure, "selection")
    behind = share.index[share == 0]
    assert 3 <= len(behind) < len(share)
    for key in study["key"][behind]:
        Ledger.open(tmp_path / "study").items_path(key, "selection").unlink()
    again = front_probability(sure, "selection")
    assert again[behind].fillna(0).eq(0).all()
    assert again[behind].notna().sum() >= 3  # the others are near, and by their items never on it
    assert front_probability(load(tmp_path / "study"), "selection")[behind].isna().all()


def test_a_study_of_two_documents_has_no_probabilities(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.dense(report=False)
    keys = [ROOT, *study.trial(0, [0.5, 0.6])]
    for key in keys:
        made = study.ledger.items(key, "selection")
        made["text/bits_per_byte"] = made["text/bits_per_byte"]._replace(cluster=np.arange(120, dtype=np.uint64) // 60)
        write_items(study.ledger.items_path(key, "selection"), made)
    assert front_probability(load(tmp_path), "selection").isna().all()
    assert all(map(math.isnan, relative_hypervolume_interval(load(tmp_path), "selection")))


def test_the_hypervolume_has_an_interval(frame: pd.DataFrame, tmp_path: Path) -> None:
    for split in ("selection", "report"):
        low, high = relative_hypervolume_interval(frame, split)
        assert low < relative_hypervolume(frame, split) < high
        assert high - low < 0.05  # paired with dense: 2 % of a value each would be 0.02 for one candidate
    SyntheticStudy(tmp_path)
    assert all(map(math.isnan, relative_hypervolume_interval(load(tmp_path), "selection")))


def test_the_knee_is_on_the_frontier(frame: pd.DataFrame, tmp_path: Path) -> None:
    assert knee_of(frame, "report")["key"] in set(frontier(frame, "report")["key"])
    study = SyntheticStudy(tmp_path)
    assert knee_of(load(tmp_path), "selection") is None
    study.dense()
    study.trial(0, [0.1, 0.2, 0.5, 0.9])  # 2 + 1.2 s^3 bits bulges upwards from size to size
    assert knee_of(load(tmp_path), "selection")["round"] == 3


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
        of_pair = compare(controlled, rows["key"].iloc[0], reference["key"]).set_index("metric").loc["text/bits_per_byte"]
        assert (loss, stderr) == pytest.approx((expected, of_pair["stderr"]))
        unknown = rows.assign(key="0" * 16)  # whose items are nowhere
        assert losses(unknown, reference, "report")[1].tolist() == pytest.approx([0.02 * math.sqrt(2)])
