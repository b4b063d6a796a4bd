"""Two candidates item by item: the pair's own error, McNemar's test, what would settle it, and what cannot be compared."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import Run
from synthetic_study import ROOT, SyntheticStudy, items

from analysis.compare import compare, describe_comparison, find, mcnemar
from analysis.load import load
from raysearch.config import Metric
from raysearch.study.ledger import Ledger


@pytest.fixture
def judged(tmp_path: Path) -> pd.DataFrame:
    """Dense, trial 0 and trial 1, scored on the report split on 400 items, right and wrong: 240, 230 (20 lost, 10 won), 240."""
    study = SyntheticStudy(tmp_path / "study", objectives=("num_nonzero", "last_word/acc"), tasks=("last_word",))
    study.dense(report=False)
    keys = [ROOT, *study.trial(0, [0.5]), *study.trial(1, [0.6])]
    for key, (lost, won) in zip(keys, [(0, 0), (20, 10), (0, 0)]):
        right = (np.arange(400) < 240).astype(float)
        right[:lost], right[400 - won or 400:] = 0, 1
        scored = {"last_word/acc": Metric(value=right.mean(), stderr=0.02, num_items=400)}
        made = items(scored, key, "report")["last_word/acc"]._replace(numerator=right)
        study.ledger.write_report_metrics(key, scored, {"last_word/acc": made})
    return load(tmp_path / "study")


def test_a_comparison_by_hand(judged: pd.DataFrame) -> None:
    (row,) = compare(judged, "dense", "0/1").to_dict("records")
    assert (row["a"], row["b"], row["difference"]) == pytest.approx((0.6, 0.575, -0.025))
    variance = (30 / 400 - 0.025**2) / 400 + 2 / 400**2
    assert row["stderr"] == pytest.approx(math.sqrt(variance), rel=0.08)
    assert row["unpaired_stderr"] == pytest.approx(math.sqrt((0.6 * 0.4 + 0.575 * 0.425) / 400), rel=0.06)
    assert (row["low"], row["high"]) == pytest.approx((-0.025 - 1.96 * row["stderr"], -0.025 + 1.96 * row["stderr"]), abs=0.003)
    assert row["better_probability"] == pytest.approx(0.04, abs=0.03)
    assert row["mcnemar"] == pytest.approx(0.0987, abs=1e-4)  # 2 P(Binomial(30, 1/2) <= 10)
    assert row["detectable"] == pytest.approx(2.8016 * row["stderr"], rel=1e-4)
    assert row["items_to_settle"] == pytest.approx(400 * (row["detectable"] / 0.025) ** 2)
    (same,) = compare(judged, "dense", "1/1").to_dict("records")
    assert (same["difference"], same["mcnemar"], same["items_to_settle"]) == (0, 1, math.inf)
    assert same["stderr"] > 0  # two models that agree on 400 items may differ on others
    (turned,) = compare(judged, "0/1", "dense").to_dict("records")
    assert (turned["low"], turned["high"], turned["mcnemar"]) == pytest.approx(
        (-row["high"], -row["low"], row["mcnemar"]), abs=2e-3)


def test_described_for_a_terminal(judged: pd.DataFrame) -> None:
    lines = describe_comparison(compare(judged, "dense", judged["key"].iloc[1][:6])).splitlines()
    assert lines[0] == f"a: dense ({ROOT})"
    assert lines[1].startswith("b: trial 0 round 1 (")
    assert lines[2] == "report split"
    assert lines[4].split()[:4] == ["last_word/acc", "0.600", "0.575", "-0.025"]
    assert lines[4].endswith("open")
    assert max(map(len, lines)) <= 140


def test_documents_and_directions(frame: pd.DataFrame) -> None:
    table = compare(frame, "1/1", "1/5").set_index("metric")  # sparsity 0.1 against 0.5
    bits = table.loc["text/bits_per_byte"]
    assert (bits["num_items"], bits["num_clusters"]) == (120, 12)
    assert math.isnan(bits["mcnemar"])
    assert bits["difference"] == pytest.approx(0.1488)
    assert bits["low"] > 0
    assert bits["better_probability"] == 0
    assert 2 * bits["stderr"] < bits["unpaired_stderr"]
    text = describe_comparison(compare(frame, "1/1", "1/5"))
    assert "120 (12 docs)" in text
    assert [line.split()[-1] for line in text.splitlines() if line.startswith(("text/b", "last_word/acc"))] == ["a", "a"]
    chosen = compare(frame, "0/1", "4/1")
    assert chosen.attrs["split"] == "selection"
    assert "by which the search chose" in describe_comparison(chosen)


@pytest.mark.parametrize("name", ["99/1", "0/9", "8/1", "zz", "", "1/", "/", "-1/1", "sparse"])
def test_what_names_no_candidate(frame: pd.DataFrame, name: str) -> None:
    with pytest.raises(ValueError, match="must name one finished round, got none in .*; give TRIAL/ROUND such as 3/2, a key"):
        find(frame, name)


def test_what_cannot_be_compared(frame: pd.DataFrame, study_directory: Path, run: Run) -> None:
    with pytest.raises(ValueError, match=r"2/1 and 6/1 are one model \(\w+\); compare two"):
        compare(frame, "2/1", "6/1")
    raced = frame.assign(dominated_by=frame["dominated_by"].mask(frame["trial"].eq(4).fillna(False), ROOT))
    with pytest.raises(ValueError, match="4/1 cannot be compared: a race ended its scoring, so it has part of the items"):
        compare(raced, "dense", "4/1")
    other = frame.assign(**{"report/text/bits_per_byte": frame["report/text/bits_per_byte"] + 1})
    assert "text/bits_per_byte has no items of both" in describe_comparison(compare(other, "1/1", "1/2"))
    assert "text/bits_per_byte" not in compare(other, "1/1", "1/2")["metric"].tolist()
    code, _, said = run("compare", study_directory, "dense", "77/1")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("raysearch: '77/1' must name one finished round")
    code, shown, _ = run("compare", study_directory, "dense", "1/2")
    assert (code, shown.splitlines()[2]) == (0, "report split")


def test_a_study_without_items(frame: pd.DataFrame, tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense(report=False)
    study.trial(0, [0.5])
    ledger = Ledger.open(tmp_path / "study")
    ledger.items_path(ROOT, "selection").unlink()
    with pytest.raises(ValueError, match="dense and 0/1 cannot be compared on the selection split: last_word/acc has no items"):
        compare(load(tmp_path / "study"), "dense", "0/1")


def test_mcnemar_against_all_outcomes() -> None:
    for ahead, behind in product(range(5), range(5)):
        outcomes = [sum(signs) for signs in product([0, 1], repeat=ahead + behind)]
        tail = np.mean([total <= min(ahead, behind) for total in outcomes])
        right = np.array([[1.0, 0.0]] * ahead + [[0.0, 1.0]] * behind + [[1.0, 1.0], [0.0, 0.0]])
        assert mcnemar(right) == pytest.approx(min(1.0, 2 * tail))
