"""A trial: its record after every round, its end, and a gang that was given up."""

import pytest

from raysearch.config import Action, Study, TrialConfig
from raysearch.study.records import TrialRecord, round_key
from raysearch.trial.actions import resolve_actions
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
