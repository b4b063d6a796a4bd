from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_study import SyntheticStudy

from analysis.candidates import frontier, pruned
from analysis.load import load
from analysis.parallel import ABSENT, parallel_coordinates
from raysearch.config import Action
from raysearch.study.records import TrialRecord


def test_lines_cross_the_axes_where_their_values_are(frame: pd.DataFrame) -> None:
    drawn = parallel_coordinates(frame)
    assert drawn is not None
    axes = {axis["name"]: axis for axis in drawn["axes"]}
    assert drawn["trials"] == list(range(12))
    assert [name for name in axes][-3:] == ["status", "non-zero parameters (smaller is better)",
                                            "text/bits_per_byte, selection split (lower is better)"]
    made = pruned(frame)
    names = [f"{drawn['trials'][trial]}/{depth}" for trial, depth in drawn["candidates"]]
    assert names == [f"{trial}/{depth}" for trial, depth in made[["trial", "round"]].to_numpy()]
    assert {names[index] for index in drawn["front"]} == {
        f"{row['trial']}/{row['round']}" for _, row in frontier(frame).iterrows() if row["status"] != "dense"}
    size = axes["non-zero parameters (smaller is better)"]["at"]
    assert (min(size), max(size)) == (ABSENT, 1000)
    assert np.argsort(size, kind="stable").tolist() == np.argsort(made["num_nonzero"].to_numpy(), kind="stable").tolist()
    for text, place in (("500k", 500_000), ("800k", 800_000)):
        (at,) = [at for at, tick in axes["non-zero parameters (smaller is better)"]["ticks"] if tick == text]
        low, high = made["num_nonzero"].min(), made["num_nonzero"].max()
        assert at == pytest.approx(ABSENT + (1000 - ABSENT) * (place - low) / (high - low), abs=1)


def test_what_a_trial_does_not_use_has_a_place_of_its_own(frame: pd.DataFrame) -> None:
    drawn = parallel_coordinates(frame)
    assert drawn is not None
    axes = {axis["name"]: axis for axis in drawn["axes"]}
    assert [trial for trial, at in enumerate(axes["rate"]["at"]) if at >= ABSENT] == [5]
    assert [trial for trial, at in enumerate(axes["threshold"]["at"]) if at >= ABSENT] == [4]
    assert [trial for trial, at in enumerate(axes["l1 lambda"]["at"]) if at >= ABSENT] == [3]  # 0 is off
    assert axes["rate"]["ticks"][0] == [ABSENT // 2, "not used"]
    assert "not used" not in [text for _, text in axes["status"]["ticks"]]
    assert all(0 <= at <= 1000 for axis in axes.values() for at in axis["at"])
    off = [at for at in axes["threshold"]["at"] if at < ABSENT]
    assert len(set(off)) == len(off) == 11  # side by side


def test_powers_of_ten_words_forks_and_ruined_candidates(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    for number in range(8):
        study.trial(number, [0.3 + 0.05 * number], learning_rate=10 ** (-5 + 0.5 * number), finetune_epochs=1.0,
                    scope=["global", "layer"][number % 2])
    action = Action(sparsity=0.6, scope="row", finetune_tokens=1000, learning_rate=1e-4)
    study.ledger.write_trial(TrialRecord(number=8, config=None, actions=(*study.ledger.trial(0).actions, action), forked_at=1,
                                         started_at=""))
    study.finish(8)
    frame = load(tmp_path / "study")
    ruined = frame["trial"] == 7
    frame.loc[ruined, "selection/text/bits_per_byte"] = 50.0
    frame.loc[ruined, "num_nonzero"] = 2_000_000
    frame.loc[ruined, ["stored_bytes", "resident_bytes"]] = 9_000_000
    drawn = parallel_coordinates(frame)
    assert drawn is not None
    axes = {axis["name"]: axis for axis in drawn["axes"]}
    begin = drawn["begin"]
    ticks = {text: at for at, text in axes["learning rate"]["ticks"]}
    assert ticks["0.0001"] - ticks["1e-05"] == pytest.approx(ticks["0.001"] - ticks["0.0001"], abs=1)
    assert axes["learning rate"]["at"][8] == axes["learning rate"]["at"][2] == ticks["0.0001"]
    middle = {text: at for at, text in axes["scope"]["ticks"]}
    assert abs(axes["scope"]["at"][8] - middle["row"]) < (1000 - begin) / 6
    bits = axes["text/bits_per_byte, selection split (lower is better)"]
    assert bits["at"][7] == 1000  # beyond the end of the axis, which the others fill
    assert max(at for index, at in enumerate(bits["at"]) if index != 7) > 700


def test_without_a_candidate_there_is_none(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.5], status="failed", num_finished=0, reason="diverged")
    assert parallel_coordinates(load(tmp_path / "study")) is None
    study.trial(1, [0.5])  # of one candidate, where no number has a spread
    drawn = parallel_coordinates(load(tmp_path / "study"))
    assert drawn is not None
    assert [len(axis["at"]) for axis in drawn["axes"][-2:]] == [1, 1]
