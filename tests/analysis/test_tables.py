import csv
import io
import json
from pathlib import Path

import pandas as pd
import pytest
from synthetic_study import SyntheticStudy

from analysis.candidates import frontier
from analysis.load import load
from analysis.tables import aligned, describe_config, results_table, with_stderr
from raysearch.units import human_bytes, human_count


def test_json_holds_every_column_and_no_nan(frame: pd.DataFrame) -> None:
    text = results_table(frame, "json")
    rows = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert len(rows) == len(frame)
    assert set(rows[0]) == {*frame, "on_frontier"}
    by_id = {(row["trial"], row["round"]): row for row in rows}
    assert by_id[(1, 5)]["num_nonzero"] == 600_000
    assert by_id[(1, 5)]["threshold"] is None
    assert by_id[(8, None)]["status"] == "failed"
    assert by_id[(4, 1)]["report/text/bits_per_byte"] is None
    assert by_id[(1, 1)]["is_alias"] is True


def test_csv_reads_back(frame: pd.DataFrame) -> None:
    rows = list(csv.DictReader(io.StringIO(results_table(frame, "csv"))))
    assert len(rows) == len(frame)
    assert (rows[0]["trial"], rows[0]["num_nonzero"]) == ("", "1000000")
    assert "nan" not in results_table(frame, "csv").lower().replace("loss is nan", "")


def test_terminal_table(frame: pd.DataFrame) -> None:
    lines = results_table(frame).splitlines()
    assert max(len(line) for line in lines) <= 140
    assert len(lines) == 1 + len(frame) + 2
    assert lines[1].split()[:9] == ["-", "0", "dense", "0.000", "0.000", "1M", "4", "MB", "2.000"]
    assert "2.100 ± 0.020" in next(line for line in lines if "  1      5  " in line)
    assert lines[-1] == "19 candidates, 25 rows shown"


def test_frontier_only(frame: pd.DataFrame) -> None:
    rows = json.loads(results_table(frame, "json", frontier_only=True))
    assert [(row["trial"], row["round"]) for row in rows] == [
        (5, 3), (3, 3), (5, 2), (2, 1), (3, 2), (1, 5), (5, 1), (3, 1), (0, 1)]
    assert all(row["on_frontier"] for row in rows)
    sizes = [row["num_nonzero"] for row in rows]
    bits = [row["report/text/bits_per_byte"] for row in rows]
    assert sizes == sorted(sizes)
    assert bits == sorted(bits, reverse=True)


def test_a_study_without_candidates(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    assert results_table(load(tmp_path / "study")).splitlines()[-1].startswith("0 candidates")
    assert json.loads(results_table(load(tmp_path / "study"), "json")) == []
    study.dense(report=False)
    study.trial(0, [0.5], status="failed", num_finished=0, reason="diverged")
    assert results_table(load(tmp_path / "study")).splitlines()[-1].startswith("0 candidates")


def test_words(frame: pd.DataFrame) -> None:
    told = [describe_config(frame[frame["trial"] == trial].iloc[0]) for trial in (3, 4, 5, 7)]
    assert told == ["cubic to 0.7 in 3, global, 3 ep, lr 0.0003, l1 0.0001", "one_shot threshold 0.5 std in 1",
                    "constant rate 0.4 in 3, global, 2 ep, lr 0.0003",
                    "exponential to 0.8 in 2, layer, 0.5 ep, lr 0.0003"]
    moved = frame[frame["trial"] == 7].assign(criterion="movement", pattern="head").iloc[0]
    assert describe_config(moved) == "exponential to 0.8 in 2, layer, movement, head, 0.5 ep, lr 0.0003"
    shared = moved.copy()
    shared[["pattern", "budget", "distill_alpha"]] = ["unstructured", "erdos_renyi", 0.5]
    assert describe_config(shared) == "exponential to 0.8 in 2, layer, movement, erdos_renyi, 0.5 ep, lr 0.0003, KL 0.5"
    shared[["budget", "distill_alpha", "distill_hidden", "lr_schedule"]] = ["owl", 0.0, 0.1, "one_cycle"]
    assert describe_config(shared).endswith("movement, owl, 0.5 ep, lr 0.0003 one_cycle, SquareHead 0.1")
    shared[["layer_drop", "trainable", "group_lambda"]] = [0.2, "vectors", 0.01]
    assert describe_config(shared).endswith("one_cycle, vectors alone, SquareHead 0.1, LayerDrop 0.2, group lasso 0.01")
    assert [human_bytes(n) for n in (512, 999_600, 3_420_000, 1.9e9)] == ["512 B", "1 MB", "3.42 MB", "1.9 GB"]
    assert [human_count(n) for n in (512, 24_100_000, 1.5e9)] == ["512", "24.1M", "1.5B"]
    nan = float("nan")
    assert [with_stderr(*pair) for pair in ((2.1154, 0.02), (2.1, nan), (nan, nan), (8123.456, 71.26))] == [
        "2.115 ± 0.020", "2.100", "", "8123.5 ± 71.3"]
    assert aligned(["a", "word"], [["10", "x"]], left=("word",)) == " a  word\n10  x\n"


def test_unknown_format(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="format must be table, json or csv, got 'xml'"):
        results_table(frame, "xml")


def test_a_raced_candidate_is_marked_and_never_on_the_frontier(frame: pd.DataFrame) -> None:
    best = frontier(frame, "selection").iloc[0]
    raced = frame.copy()
    raced.loc[raced["key"] == best["key"], "dominated_by"] = "rival"
    raced.attrs = frame.attrs
    assert best["key"] not in set(frontier(raced, "selection")["key"])
    assert len(frontier(raced, "selection"))
    text = results_table(raced)
    assert "~ dominated: scoring stopped early" in text
    assert "~ dominated" not in results_table(frame)


def test_a_control_has_its_rows_and_a_line(controlled: pd.DataFrame, frame: pd.DataFrame) -> None:
    lines = results_table(controlled).splitlines()
    assert [line.split()[:3] for line in lines[-6:-3]] == [["-", str(number), "control"] for number in (1, 2, 3)]
    assert lines[-2] == "19 candidates, 28 rows shown"
    assert lines[-1] == ("dense control (the longest trial's fine-tuning, without pruning): selection 1.925 ± 0.020, report "
                         "1.935 ± 0.020")
    assert results_table(controlled, frontier_only=True).splitlines()[-1] == lines[-1]
    assert results_table(controlled, "csv", frontier_only=True) == results_table(frame, "csv", frontier_only=True)
    rows = json.loads(results_table(controlled, "json"))
    assert [row["on_frontier"] for row in rows if row["status"] == "control"] == [False] * 3
    assert describe_config(controlled.iloc[-1]) == "dense control"


def test_a_trial_that_was_given_as_actions_says_so(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.5])
    study.ledger.write_trial(study.ledger.trial(0).model_copy(update={"config": None}))
    assert [line.split("  ")[-1] for line in results_table(load(tmp_path / "study")).splitlines()[1:3]] == [
        "dense baseline", "by a list of actions: to 0.5, global"]
