"""A trial: its record after every round, its end, and a gang that was given up."""

import pytest

from raysearch.config import Action, Study, TrialConfig
from raysearch.study.records import TrialRecord, round_key
from raysearch.trial.actions import control_actions, resolve_actions
from raysearch.trial.round import dense_round, run_round
from raysearch.trial.run import Superseded, run_trial
from raysearch.trial.worker import Worker


def test_a_trial_writes_its_record_after_every_round(worker: Worker, study: Study) -> None:
    config = TrialConfig(target_sparsity=0.6, schedule="linear", num_rounds=3)
    actions = resolve_actions(config, study, 10**6)
    seen = [record.model_copy() for record in run_trial(worker, TrialRecord(number=7, config=config, actions=actions,
                                                                           started_at=""))]
    assert [(len(r.keys), r.status) for r in seen] == [(1, "running"), (2, "running"), (3, "running"), (3, "done")]
    assert worker.ledger.trial(7) == seen[-1]
    assert [round(worker.ledger.candidate(key).sparsity, 3) for key in seen[-1].keys] == [0.2, 0.4, 0.6]


@pytest.mark.parametrize("change", [{"started_at": "later"}, {"status": "failed"}])
def test_a_gang_that_was_given_up_writes_nothing_more(worker: Worker, study: Study, change: dict[str, str]) -> None:
    config = TrialConfig(target_sparsity=0.6, schedule="linear", num_rounds=3)
    trial = TrialRecord(number=9, config=config, actions=resolve_actions(config, study, 10**6), started_at="")
    rounds = run_trial(worker, trial)
    taken = next(rounds).model_copy(update=change)
    worker.ledger.write_trial(taken)
    with pytest.raises(Superseded, match="trial 9 was begun here at .*, but its record is of another gang now"):
        next(rounds)
    assert worker.ledger.trial(9) == taken


def test_divergence_is_recorded_with_its_reason(worker: Worker, study: Study) -> None:
    config = TrialConfig(target_sparsity=0.5, finetune_epochs=1.0, learning_rate=1e9)
    actions = resolve_actions(config, study, 10**6)
    *_, last = run_trial(worker, TrialRecord(number=8, config=config, actions=actions, started_at=""))
    assert last.status == "failed"
    assert last.keys == ()
    assert last.reason.startswith("round 1: ")
    assert not worker.ledger.round_directory(round_key(worker.inputs.root_key, actions[0])).exists()
    assert run_round(worker, dense_round(worker), Action(sparsity=0.0)).sparsity == 0.0  # the engine is whole again


def test_a_control_gains_what_training_alone_gives(apart: Worker, study: Study) -> None:
    trained = resolve_actions(TrialConfig(target_sparsity=0.6, finetune_epochs=1.0, learning_rate=1e-3), study, 10**6)
    *_, last = run_trial(apart, TrialRecord(number=-2, config=None, actions=control_actions(trained), started_at=""))
    assert (last.status, len(last.keys)) == ("done", 1)
    assert (apart.ledger.trials(), apart.ledger.controls()) == ([], [last])
    dense, control = dense_round(apart), apart.ledger.candidate(last.keys[0])
    assert control.sparsity == dense.sparsity
    assert control.metrics["text/bits_per_byte"].value < dense.metrics["text/bits_per_byte"].value


def test_a_control_is_scored_on_every_item_in_a_study_with_racing(apart: Worker, study: Study,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate that ruins the model: a trial's race against the dense baseline ends early, the control's does not."""
    monkeypatch.setattr("raysearch.evaluation.racing.FIRST_ITEMS", 2)
    monkeypatch.setattr(apart, "study", study.replaced(racing_level=0.5))
    ruined = Action(sparsity=0.0, finetune_tokens=256, learning_rate=0.02)
    also = ruined.model_copy(update={"finetune_tokens": 512})
    dense = dense_round(apart)
    *_, trial = run_trial(apart, TrialRecord(number=0, config=None, actions=(ruined,), started_at=""))
    *_, control = run_trial(apart, TrialRecord(number=-2, config=None, actions=(also,), started_at=""))
    assert apart.ledger.candidate(trial.keys[0]).dominated_by == dense.key
    whole = apart.ledger.candidate(control.keys[0])
    assert whole.dominated_by is None
    assert whole.metrics["text/bits_per_byte"].num_items == dense.metrics["text/bits_per_byte"].num_items
