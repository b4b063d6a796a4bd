from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_study import SyntheticStudy

from analysis.candidates import pruned, quality
from analysis.importance import as_used, dependence, explained_share, importance, quality_at_equal_size
from analysis.load import load
from raysearch.config import Action
from raysearch.study.records import TrialRecord


def test_explained_share_by_hand() -> None:
    # means 1 and 3, within 2 * 0.5 + 2 * 0.5 ... : values 0.5 1.5 2.5 3.5: SS_within 1 over n - k = 2, total 5 over 3
    assert explained_share(np.array([0.5, 1.5, 2.5, 3.5]), np.array([0, 0, 1, 1])) == pytest.approx(1 - 0.5 / (5 / 3))
    assert explained_share(np.array([1.0, 1.0, 2.0, 2.0]), np.array([0, 0, 1, 1])) == 1.0
    assert explained_share(np.array([1.0, 2.0, 1.0, 2.0]), np.array([0, 0, 1, 1])) == 0.0
    assert explained_share(np.array([1.0, 1.0]), np.array([0, 1])) == 0.0


def test_noise_explains_nothing_on_average() -> None:
    generator = np.random.default_rng(0)
    shares = [explained_share(generator.standard_normal(40), generator.integers(0, 4, 40)) for _ in range(300)]
    assert np.mean(shares) < 0.05  # eta squared without the adjustment would be 3 / 39 = 0.077


def test_size_is_taken_out() -> None:
    size = np.linspace(1, 2, 50)
    assert np.abs(quality_at_equal_size(size, np.exp(size))).max() < 1e-9  # ranks: any monotone curve vanishes
    residual = quality_at_equal_size(size, size + np.tile([0.3, -0.3], 25))
    assert residual[::2].mean() > 0.1 > -0.1 > residual[1::2].mean()


def test_finds_what_matters(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    generator = np.random.default_rng(1)
    for number in range(24):
        sparsities = sorted(generator.uniform(0.1, 0.7, 2).tolist())
        study.trial(number, sparsities, scope=["global", "layer"][number % 2],
                    schedule=["linear", "cubic"][number // 12], finetune_epochs=float(generator.choice([1.0, 3.0])))
    table = importance(load(tmp_path / "study")).set_index("hyperparameter")
    assert table.index[0] == "scope"
    assert table.loc["scope", "best_level"] == "global"
    assert table.loc["scope", "share"] > max(0.3, 2 * table.loc["scope", "chance"])
    assert table.loc["schedule", "share"] <= table.loc["schedule", "chance"]
    assert table.loc["target_sparsity", "num_levels"] == 4
    assert "criterion" not in table.index  # did not vary


def test_not_used_is_a_level(frame: pd.DataFrame) -> None:
    table = importance(frame).set_index("hyperparameter")
    assert table.loc["rate", "num_levels"] == 2
    assert table["share"].between(0, 1).all()
    pd.testing.assert_frame_equal(importance(frame), importance(frame))


def test_too_little_to_say(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    with pytest.raises(ValueError, match="at least 8 candidates of 4 trials, got 0 of 0"):
        importance(load(tmp_path / "study"))
    study.trial(0, [0.05 * i for i in range(1, 13)])
    with pytest.raises(ValueError, match="got 12 of 1"):
        importance(load(tmp_path / "study"))


def test_a_control_says_nothing_about_hyper_parameters(controlled: pd.DataFrame, frame: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(importance(controlled), importance(frame))


@pytest.mark.parametrize("quality", [lambda size: np.full(len(size), 2.5), lambda size: -size, lambda size: size**3])
def test_a_quality_that_size_explains_whole_leaves_nothing_to_explain(frame: pd.DataFrame, quality: Callable) -> None:
    """What is left is rounding, 3e-15, of which levels once explained 44 %."""
    size = np.arange(40, dtype=float)
    assert not quality_at_equal_size(size, quality(size)).any()
    frame["selection/text/bits_per_byte"] = quality(frame["num_nonzero"].astype(float))
    with pytest.raises(ValueError, match="needs candidates whose quality differs at equal size, got none that do"):
        importance(frame)


def test_dependence_by_hand(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    for number in range(6):
        study.trial(number, [0.2 + 0.1 * number, 0.25 + 0.1 * number], scope=["global", "layer"][number % 2],
                    finetune_epochs=float(number // 5), schedule="linear")
    frame = load(tmp_path / "study")
    table = dependence(frame)
    made = pruned(frame)
    residual = pd.Series(quality_at_equal_size(made["num_nonzero"], quality(made, "selection")), made.index)
    for scope in ("global", "layer"):
        (row,) = table[(table["hyperparameter"] == "scope") & (table["level"] == scope)].to_dict("records")
        of_level = residual[made["scope"] == scope]
        assert row["effect"] == pytest.approx(of_level.mean())
        by_trial = (of_level - of_level.mean()).groupby(made["trial"]).sum()
        assert row["stderr"] == pytest.approx(np.sqrt((by_trial**2).sum() * 3 / 2) / 6)
        assert (row["num_candidates"], row["num_trials"]) == (6, 3)
    assert np.isnan(table.loc[(table["hyperparameter"] == "finetune_epochs") & (table["level"] == "1"), "stderr"]).all()
    levels = table.loc[table["hyperparameter"] == "target_sparsity", "level"].tolist()
    assert levels == sorted(levels, key=lambda text: float(text.split()[0]))


def test_what_nothing_depends_on_is_missing(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.3], finetune_epochs=0.5, learning_rate=1e-3)
    study.trial(1, [0.3, 0.5], schedule="linear", finetune_epochs=0.0, learning_rate=1e-4)
    study.trial(2, [0.4], threshold=0.5, threshold_unit="std", finetune_epochs=2.0)
    action = Action(sparsity=0.6, scope="layer", criterion="wanda", finetune_tokens=2000, learning_rate=2e-3)
    first = study.ledger.trial(0).actions
    study.ledger.write_trial(TrialRecord(number=3, config=None, actions=(*first, action), forked_at=1, started_at=""))
    study.finish(3)
    frame = load(tmp_path / "study")
    used = as_used(frame[frame["trial"].notna()]).set_axis(frame["trial"].dropna())
    used = used[~used.index.duplicated()].astype(object).where(lambda values: values.notna(), None)
    assert used["learning_rate"].tolist() == [1e-3, None, 3e-4, 2e-3]
    assert used["scope"].tolist() == ["global", "global", None, "layer"]
    assert used["schedule"].tolist() == ["one_shot", "linear", "one_shot", "fork"]
    assert used["finetune_epochs"].tolist() == [0.5, 0.0, 2.0, 2.0]
    assert used["target_sparsity"].tolist() == [0.3, 0.5, None, 0.6]
    assert used["threshold"].tolist() == [None, None, 0.5, None]
    assert not {"threshold_unit", "l1_lambda", "owl_m", "temperature", "pattern", "rate"} & {*used}  # do not vary
