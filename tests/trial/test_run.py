"""A trial: its record after every round, its end, and a gang that was given up."""

from pathlib import Path

import pytest

from raysearch.config import Action, Study, TrialConfig
from raysearch.study.ledger import Ledger
from raysearch.study.records import TrialRecord, round_key
from raysearch.trial.actions import control_actions, resolve_actions
from raysearch.trial.inputs import read_inputs
from raysearch.trial.round import dense_round, run_round, train_candidate
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


def test_chains_of_all_lengths_compute_each_round_once_and_give_what_each_gives_alone(
        apart: Worker, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's kind of set: for two (rate, L1, epochs) the constant rate for 1 to 5 rounds."""
    computed = []
    monkeypatch.setattr("raysearch.trial.round.train_candidate",
                        lambda worker, parent, action: computed.append(action) or train_candidate(worker, parent, action))

    def run(worker: Worker, number: int, config: TrialConfig) -> TrialRecord:
        *_, last = run_trial(worker, TrialRecord(number=number, config=config, actions=resolve_actions(config, study, 10**6),
                                                 started_at=""))
        return last

    configs = [TrialConfig(schedule="constant", rate=rate, l1_lambda=l1, finetune_epochs=0.5, learning_rate=1e-3,
                           num_rounds=length)
               for rate, l1 in ((0.1, 1e-3), (0.3, 1e-5)) for length in (1, 2, 3, 4, 5)]
    together = [run(apart, number, config) for number, config in enumerate(configs)]
    assert [len(trial.keys) for trial in together] == [1, 2, 3, 4, 5] * 2
    assert len(computed) == 10  # of 30
    for number in (4, 7):
        alone = Worker(study, Ledger(tmp_path / f"alone{number}"), read_inputs(study))
        before = len(computed)
        keys = run(alone, number, configs[number]).keys
        assert (len(computed) - before, keys) == (len(keys), together[number].keys)
        for key in keys:
            files = [ledger.weights_path(key).read_bytes() for ledger in (apart.ledger, alone.ledger)]
            assert files[0] == files[1]
            records = [ledger.candidate(key) for ledger in (apart.ledger, alone.ledger)]
            assert (records[0].metrics, records[0].train_loss) == (records[1].metrics, records[1].train_loss)
