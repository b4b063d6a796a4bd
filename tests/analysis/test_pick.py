import json
import math
import runpy
from pathlib import Path

import pandas as pd
import pytest
from synthetic_study import SyntheticStudy, twelve_trials

from analysis.constraints import Constraint, parse_constraints
from analysis.load import load
from analysis.pick import describe_pick, pick, read_pick, write_pick
from analysis.plots import frontier_figure
from analysis.tables import results_table
from raysearch.study.ledger import Ledger


def test_the_smallest_within_a_drop(frame: pd.DataFrame, study_directory: Path) -> None:
    result = pick(frame, parse_constraints(max_drop=["text/bits_per_byte=0.1"]))
    # report bits: s .5, e 1: 2.115 (dense is 2.01); s .55, e 3: 2.13965; s .4, e 1: 2.0418; s .4, e 2: 2.0251
    assert (result.trial, result.round, result.num_nonzero) == (5, 1, 680_000)  # 1,4 ties in size; 5,1 is better
    assert [(one.trial, one.round) for one in result.runners_up] == [(1, 4), (3, 1), (0, 3), (0, 2), (0, 1)]
    assert (result.num_satisfying, result.num_scored) == (6, 12)
    (check,) = result.checks
    assert check.value == pytest.approx(0.0151333, abs=1e-6)
    assert check.margin == pytest.approx(0.1 - 0.0151333, abs=1e-6)
    assert check.stderr < 0.02 * math.sqrt(2) / 3  # of the paired difference
    assert not check.within_2_stderr
    assert result.study_directory == str(study_directory.resolve())
    assert result.dense_metrics["text/bits_per_byte"].value == pytest.approx(2.01)
    assert result.metrics["last_word/perplexity"].stderr is None
    assert result.config["rate"] == 0.4


def test_accuracy_drop_is_in_points(frame: pd.DataFrame) -> None:
    result = pick(frame, parse_constraints(max_drop=["last_word/acc=8"]))
    assert (result.trial, result.round) == (3, 2)  # .6 - .3 * .55^2 + .075 / 4 - .015 against .59: 7.7 points
    assert result.checks[0].value == pytest.approx(7.7)
    assert result.checks[0].margin == pytest.approx(0.3)
    assert result.checks[0].within_1_stderr


def test_max_drop_may_demand_a_gain_and_sizes_combine(frame: pd.DataFrame) -> None:
    result = pick(frame, parse_constraints("3.5MB", "900k", ["text/bits_per_byte=-0.01"]))
    assert (result.trial, result.round, result.num_nonzero) == (3, 1, 760_000)
    assert [check.margin >= 0 for check in result.checks] == [True, True, True]


def test_a_drop_of_exactly_the_limit_satisfies_it(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    (key,) = study.trial(0, [0.5], report=True)
    frame = load(tmp_path / "study")
    frame.loc[frame["status"] == "dense", "report/last_word/acc"] = 0.61
    frame.loc[frame["key"] == key, "report/last_word/acc"] = 0.60
    assert 100 * (0.61 - 0.60) > 1.0
    assert pick(frame, parse_constraints(max_drop=["last_word/acc=1"])).checks[0].margin == 0.0


def test_stored_bytes_as_the_study_size(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study", objectives=("stored_bytes", "text/bits_per_byte"))
    study.dense()
    study.trial(0, [0.02, 0.5], report=True)
    result = pick(load(tmp_path / "study"), [Constraint(kind="max", metric="text/bits_per_byte", limit=3.0)])
    assert (result.round, result.size, result.stored_bytes) == (2, "stored_bytes", 2_500_000)


def test_predicted_times_are_a_size_a_limit_and_a_column(tmp_path: Path, frame: pd.DataFrame) -> None:
    study = SyntheticStudy(tmp_path / "study", objectives=("predicted_ms", "text/bits_per_byte"))
    study.dense()
    study.trial(0, [0.2, 0.5], report=True)
    rows = load(tmp_path / "study")
    assert rows["predicted_ms"].tolist() == [10.0, 9.0, 7.5]
    result = pick(rows, parse_constraints(max_predicted_ms=9.2))
    assert (result.round, result.predicted_ms, result.checks[0].margin) == (2, 7.5, 1.7)  # the fastest
    assert "7.5 ms predicted" in describe_pick(result)
    assert "predicted ms" in results_table(rows)
    figure = frontier_figure(rows)
    assert figure.layout.xaxis.title.text == "predicted ms of a batch (smaller is better)"
    assert figure.layout.updatemenus[0].buttons[0].label == "predicted ms of a batch"
    assert "predicted ms" not in results_table(frame)
    with pytest.raises(ValueError, match=r"--max-predicted-ms 9.2: the study predicted no times, for its search does not ask"):
        pick(frame, parse_constraints(max_predicted_ms=9.2))


def test_why_none(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        pick(frame, parse_constraints("1.5MB", None, ["text/bits_per_byte=0.02"]))
    assert str(caught.value) == (
        "no candidate satisfies all constraints: --max-bytes 1,500,000 is satisfied by 0 of 12 (the nearest that "
        "misses is trial 5 round 3, 91,200 bytes too many); --max-drop text/bits_per_byte=0.02 is satisfied by 5 of "
        "12 (the nearest that misses is trial 1 round 4, by 0.0118, standard error 0.0042); the nearest to all is "
        "trial 5 round 1, which misses only --max-bytes 1,500,000 (1,320,000 bytes too many)")


def test_only_the_dense_baseline(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.8], report=True)
    with pytest.raises(ValueError, match=r"the constraint: --max-drop last_word/acc=0 is satisfied by 0 of 1 .*"
                                         r"trial 0 round 1, by 19\.7 points, .* 0\.4\d\); only the dense baseline"):
        pick(load(tmp_path / "study"), parse_constraints(max_drop=["last_word/acc=0"]))


def test_unscored_study_is_told_to_finish(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    limit = parse_constraints("3MB")
    with pytest.raises(ValueError, match="no candidate has finished"):
        pick(load(tmp_path / "study"), limit)
    study.dense(report=False)
    study.trial(0, [0.5])
    with pytest.raises(ValueError, match=r"no candidate scored on the report split.*; run the sweep to its end"):
        pick(load(tmp_path / "study"), limit)
    study.trial(1, [0.6], report=True)
    with pytest.raises(ValueError, match="the dense baseline is not scored on the report split"):
        pick(load(tmp_path / "study"), limit)


def test_refusals(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="at least one constraint, got none"):
        pick(frame, [])
    with pytest.raises(ValueError, match="metric must be one of last_word/acc, last_word/perplexity, text/bits_per_"):
        pick(frame, parse_constraints(minimum=["choice/acc=0.5"]))


def test_written_picks_come_back(frame: pd.DataFrame, tmp_path: Path) -> None:
    result = pick(frame, parse_constraints(max_drop=["text/bits_per_byte=0.1"]))
    path = write_pick(result, tmp_path / "out" / "pick.json")
    assert read_pick(path) == result
    assert json.loads(path.read_text())["key"] == result.key
    path.write_text('{"key": "x"}')
    with pytest.raises(ValueError, match="not a pick of this version"):
        read_pick(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_pick(tmp_path / "none.json")


def test_described_for_a_terminal(frame: pd.DataFrame) -> None:
    lines = describe_pick(pick(frame, parse_constraints("3MB", None, ["text/bits_per_byte=0.1"]))).splitlines()
    assert lines[0].startswith("picked trial 5 round 1 (")
    assert lines[0].endswith("): sparsity 0.400, 680k non-zero of 1M, 2.82 MB stored")
    assert lines[1] == "pruned constant rate 0.4 in 3, global, 2 ep, lr 0.0003"
    assert lines[3].split() == ["last_word/acc", "0.554", "±", "0.035", "0.590", "±", "0.035"]
    assert lines[6] == "--max-bytes 3,000,000: 2,820,000, margin 180,000"
    assert lines[7] == "--max-drop text/bits_per_byte=0.1: 0.01513, margin 0.08487, standard error 0.00595"
    assert lines[8] == "runner-up trial 1 round 4: sparsity 0.400, 680k non-zero of 1M, 2.82 MB stored"
    doubtful = describe_pick(pick(frame, parse_constraints(max_drop=["last_word/acc=8"])))
    assert "; within 1 standard error: other items could turn it" in doubtful


def test_equal_studies_give_equal_picks(tmp_path: Path) -> None:
    limit = parse_constraints(max_drop=["text/bits_per_byte=0.1"])
    one = pick(load(twelve_trials(tmp_path / "one")), limit)
    two = pick(load(twelve_trials(tmp_path / "two")).sample(frac=1, random_state=3), limit)
    assert one.model_copy(update={"study_directory": ""}) == two.model_copy(update={"study_directory": ""})


def test_a_pick_stands_beside_dense_and_control(controlled: pd.DataFrame, frame: pd.DataFrame) -> None:
    limit = parse_constraints("3MB", None, ["text/bits_per_byte=0.1"])
    result = pick(controlled, limit)
    assert result.checks == pick(frame, limit).checks  # max_drop stays against the dense model
    assert result.control_metrics["text/bits_per_byte"].value == pytest.approx(1.935)
    lines = describe_pick(result).splitlines()
    assert lines[2].split() == ["report", "split", "picked", "dense", "control"]
    assert lines[5].split()[1:] == ["2.025", "±", "0.020", "2.010", "±", "0.020", "1.935", "±", "0.020"]
    assert lines[8] == ("drop against the dense control, which was fine-tuned as long without pruning: text/bits_per_byte "
                        "0.09013, standard error 0.00864")
    by_size = describe_pick(pick(controlled, parse_constraints("3MB")))
    assert "without pruning: text/bits_per_byte " in by_size  # the objective, where no drop is limited
    points = describe_pick(pick(controlled, parse_constraints(max_drop=["last_word/acc=8"])))
    assert "without pruning: last_word/acc 9.575 points, standard error" in points  # 60.875 - 51.3
    assert "control" not in describe_pick(pick(frame, limit))


@pytest.mark.parametrize("place", ["study/pick.json", "pick.json", "picks/mine.json"])
def test_a_study_that_was_moved_with_its_pick_is_found(tmp_path: Path, place: str) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    (before / "model").mkdir(parents=True)
    twelve_trials(before / "study")
    ledger = Ledger(before / "study")
    record = ledger.study()
    ledger.write_study(record.model_copy(update={"study": record.study.replaced(path=str(before / "model"))}))
    picked = pick(load(before / "study"), parse_constraints(max_bytes="3MB"))
    write_pick(picked, before / place)
    assert str(tmp_path) not in json.loads((before / place).read_text())["study_directory"]
    (tmp_path / "alone.json").write_text((before / place).read_text())
    assert read_pick(tmp_path / "alone.json") == picked
    before.rename(after)
    again = read_pick(after / place)
    assert again == picked.model_copy(update={"study_directory": str(after / "study")})
    moved = Ledger.open(again.study_directory)
    assert moved.study().study.model.path == str(after / "model")
    assert moved.candidate(again.key).key == picked.key


def test_a_damaged_pick_is_refused(tmp_path: Path) -> None:
    path = write_pick(pick(load(twelve_trials(tmp_path / "study")), parse_constraints(max_bytes="3MB")), tmp_path / "pick.json")
    path.write_text(path.read_text().replace('"trial": ', '"trial": 1'))
    with pytest.raises(ValueError, match="pick.json: not a pick of this version of raysearch, or damaged"):
        read_pick(path)


def test_a_pick_with_confidence(frame: pd.DataFrame) -> None:
    plain = pick(frame, parse_constraints(max_drop=["text/bits_per_byte=0.1"]))
    certain = pick(frame, parse_constraints("3MB", None, ["text/bits_per_byte=0.1@95%"]))
    assert (certain.trial, certain.round) == (plain.trial, plain.round) == (5, 1)
    size, check = certain.checks
    assert (size.bound, size.stderr) == (None, None)
    assert check.value == pytest.approx(plain.checks[0].value)
    assert check.value < check.bound < 0.1
    assert check.margin == pytest.approx(0.1 - check.bound)
    assert check.stderr == plain.checks[0].stderr  # of the paired difference
    assert certain.next_uncertain.num_nonzero < certain.num_nonzero
    lines = describe_pick(certain).splitlines()
    assert lines[7].startswith("--max-drop text/bits_per_byte=0.1@95%: 0.01513, margin 0.0")
    assert ", at most 0.0" in lines[7]
    assert "with 95 %, standard error" in lines[7]
    assert lines[-1].startswith("the next smaller is not certain: trial ")
    one_of_each = pick(frame, parse_constraints(max_drop=["text/bits_per_byte=0.1@95%", "last_word/acc=20"]))
    assert len(one_of_each.checks) == 2
    assert one_of_each.checks[1].bound is None


def test_none_is_certain(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"no candidate is certain: of 12 the nearest is trial \d round \d, .* stored: "
                                         r"--max-drop text/bits_per_byte=-0.04@95% is -0\.\d+, at most -0\.\d+ with 95 %; "
                                         r"about [\d,]+ items more would tell$"):
        pick(frame, parse_constraints(max_drop=["text/bits_per_byte=-0.04@95%"]))
    with pytest.raises(ValueError, match=r"the nearest is .*; no number of items would make that certain"):
        pick(frame, parse_constraints(max_drop=["text/bits_per_byte=-0.5@95%"]))
    with pytest.raises(ValueError, match=r"no candidate satisfies the constraint: --max-bytes 1,000 is satisfied by 0 of 12"):
        pick(frame, parse_constraints("1kB", None, ["text/bits_per_byte=0.1@95%"]))


def test_a_confidence_needs_items_of_both_splits(tmp_path: Path) -> None:
    limit = parse_constraints(max_drop=["text/bits_per_byte=0.1@95%"])
    ledger = Ledger(twelve_trials(tmp_path / "study"))
    best = pick(load(tmp_path / "study"), limit)
    ledger.items_path(best.key, "selection").unlink()
    assert pick(load(tmp_path / "study"), limit).key != best.key  # its items are lost; the others stay
    ledger.items_path(ledger.study().root_key, "report").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"a confidence needs the items of dense and of a candidate on .* got none; leave out"):
        pick(load(tmp_path / "study"), limit)
    assert pick(load(tmp_path / "study"), parse_constraints(max_drop=["text/bits_per_byte=0.1"])).key == best.key


def test_simulated_picks_keep_their_limit() -> None:
    """A small version of benchmarks/decisions.py, with 400 items instead of 5,000."""
    found = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "decisions.py"))["simulated"](40, 20, 400, 0.3, 5.0)
    assert found["picked"] >= 0.5
    assert found["broken"] <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 40)
    assert found["naive_broken"] >= found["broken"] + 0.1  # chosen and published on the same items
    for name in ("candidates_covered", "frontier_covered", "hypervolume_covered"):
        assert found[name] >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 40)


def test_a_candidate_that_is_named(frame: pd.DataFrame) -> None:
    picked = pick(frame, (), "3/2")
    assert (picked.trial, picked.round, picked.checks, picked.runners_up, picked.num_scored) == (3, 2, (), (), 1)
    with pytest.raises(ValueError, match="--candidate 3/2 and --max-bytes 3,000,000 contradict each other"):
        pick(frame, parse_constraints("3MB"), "3/2")
    for name in ("10/1", "dense"):
        with pytest.raises(ValueError, match=f"--candidate {name} must be a pruned one that was scored on the report split"):
            pick(frame, (), name)
    with pytest.raises(ValueError, match="'3/9' must name one finished round, got none"):
        pick(frame, (), "3/9")
