"""Which dense control a study needs, and which rounds are a control's alone."""

from pathlib import Path

import pytest
from synthetic_study import SyntheticStudy

from raysearch.search.control import due_control, give_up_others, keys_of_controls_only, last_control
from raysearch.study.records import TrialRecord


@pytest.fixture
def study(tmp_path: Path) -> SyntheticStudy:
    """Trial 1 is the longest by what it finished: trial 2 would be longer, and failed in its second round."""
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.3], finetune_epochs=1.0)
    study.trial(1, [0.2, 0.5], finetune_epochs=2.0, l1_lambda=1e-4, scope="layer")
    study.trial(2, [0.2, 0.4, 0.6], finetune_epochs=3.0, status="failed", num_finished=1, reason="diverged")
    study.trial(3, [0.1, 0.4], finetune_epochs=2.0, learning_rate=1e-2)  # as long as trial 1
    return study


def due(study: SyntheticStudy, **settings: object) -> TrialRecord | None:
    return due_control(study.ledger, study.ledger.study().study.replaced(**settings))


def test_the_longest_trials_fine_tuning_without_pruning(study: SyntheticStudy) -> None:
    control, longest = due(study), study.ledger.trial(1)
    assert (control.number, control.config, control.status, control.keys) == (-2, None, "running", ())
    assert [(action.finetune_tokens, action.learning_rate) for action in control.actions] == [
        (action.finetune_tokens, action.learning_rate) for action in longest.actions]
    assert {(action.sparsity, action.l1_lambda, action.scope) for action in control.actions} == {(0.0, 0.0, "global")}
    assert due(study, dense_control=False) is None


def test_none_where_nothing_was_fine_tuned(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    assert due(study) is None
    study.dense()
    study.trial(0, [0.3, 0.5])
    study.trial(1, [0.4], finetune_epochs=1.0, status="failed", num_finished=0)
    assert due(study) is None


def test_a_finished_control_is_not_due_until_a_longer_trial_ends(study: SyntheticStudy) -> None:
    study.control()
    assert due(study) is None
    study.trial(4, [0.1, 0.2, 0.3], finetune_epochs=2.0)
    assert (due(study).number, len(due(study).actions)) == (-3, 3)
    keys = study.control()
    assert [control.number for control in study.ledger.controls()] == [-2, -3]
    assert last_control(study.ledger).keys == tuple(keys)
    assert due(study) is None


@pytest.mark.parametrize(("status", "reason"), [("running", None), ("failed", "its process died twice")])
def test_one_that_did_not_finish_is_due_again_under_its_number(study: SyntheticStudy, status: str, reason: str | None) -> None:
    keys = study.control(report=False, num_finished=1, status=status, reason=reason)
    again = due(study)
    assert (again.number, again.status, again.reason, again.keys) == (-2, "running", None, tuple(keys))
    assert last_control(study.ledger) is None


def test_one_that_another_trial_has_outgrown_does_not_run_for_ever(study: SyntheticStudy) -> None:
    study.control(report=False, num_finished=1, status="running")
    study.trial(4, [0.1, 0.2, 0.3], finetune_epochs=2.0)
    give_up_others(study.ledger, due(study))
    (given_up,) = study.ledger.controls()
    assert (given_up.status, given_up.reason) == ("stopped", "another trial is the longest now")
    assert due(study).number == -3


def test_a_round_that_a_trial_made_too_is_the_trials(study: SyntheticStudy) -> None:
    keys = study.control()
    assert keys_of_controls_only(study.ledger) == set(keys)
    study.trial(4, [0.0], finetune_epochs=2.0)  # does what the control's first round does
    assert study.ledger.trial(4).keys[0] == keys[0]
    assert keys_of_controls_only(study.ledger) == {keys[1]}
