"""Rounds and trials on a real engine, in this process."""

import math
import os
from pathlib import Path

import pytest
import torch

import raysearch.trial.round
from raysearch.config import Action, Study, TrialConfig
from raysearch.models.weights import read_weights
from raysearch.search.retention import frontier_keys
from raysearch.study.files import file_sha256
from raysearch.study.ledger import Ledger
from raysearch.study.records import RoundRecord, TrialRecord, round_key
from raysearch.training.finetune import Diverged, finetune
from raysearch.trial.actions import resolve_actions
from raysearch.trial.inputs import read_inputs
from raysearch.trial.round import check_quality, dense_round, load_candidate, report_round, run_round
from raysearch.trial.run import Superseded, run_trial
from raysearch.trial.worker import Worker

TOKENS = 64 * 16


def weights_of(worker: Worker) -> dict[str, torch.Tensor]:
    return {name: worker.engine.gather(name).clone() for name in worker.engine.shapes}


def test_sparsity_zero_reproduces_the_dense_metrics(worker: Worker) -> None:
    dense = dense_round(worker)
    same = run_round(worker, dense, Action(sparsity=0.0))
    assert same.metrics == dense.metrics
    assert report_round(worker, same) == report_round(worker, dense)
    assert (same.sparsity, same.num_nonzero) == (0.0, dense.num_nonzero)


def test_counts_are_those_of_the_weights(worker: Worker) -> None:
    record = run_round(worker, dense_round(worker), Action(sparsity=0.3, finetune_tokens=TOKENS, learning_rate=1e-3))
    stored = read_weights(worker.ledger.round_directory(record.key) / "weights.safetensors", record.weights_sha256)
    prunable = [p.name for p in worker.engine.prunables]
    num_prunable = sum(stored[name].numel() for name in prunable)
    assert record.num_prunable == num_prunable
    assert record.num_nonzero == sum(int(w.count_nonzero()) for w in stored.values())
    zeros = sum(int((stored[name] == 0).sum()) for name in prunable)
    assert zeros == round(0.3 * num_prunable)
    assert record.sparsity == zeros / num_prunable
    assert record.resident_bytes == 4 * record.num_parameters
    assert record.stored_bytes < record.resident_bytes
    assert math.isfinite(record.train_loss)
    current = weights_of(worker)
    assert all(torch.equal(stored[name], current[name]) for name in stored)


def test_a_round_depends_on_nothing_but_parent_and_action(worker: Worker, study: Study, tmp_path: Path) -> None:
    first = Action(sparsity=0.2, finetune_tokens=TOKENS, learning_rate=1e-3)
    second = first.model_copy(update={"sparsity": 0.4, "data_start_tokens": TOKENS})
    straight = run_round(worker, run_round(worker, dense_round(worker), first), second)
    wanted = weights_of(worker)
    elsewhere = Worker(study, Ledger(tmp_path), read_inputs(study))
    parent = run_round(elsewhere, dense_round(elsewhere), first)
    run_round(elsewhere, dense_round(elsewhere), Action(sparsity=0.9))  # something else in between
    elsewhere.loaded_key = None
    again = run_round(elsewhere, parent, second)
    assert again.key == straight.key
    assert again.metrics == straight.metrics
    assert all(torch.equal(w, wanted[name]) for name, w in weights_of(elsewhere).items())


def test_a_finished_round_is_not_computed_again(worker: Worker) -> None:
    dense = dense_round(worker)
    action = Action(sparsity=0.25)
    record = run_round(worker, dense, action)
    steps = []
    worker.engine.set_masks, original = lambda masks: steps.append(masks), worker.engine.set_masks
    try:
        assert run_round(worker, dense, action) == record
    finally:
        worker.engine.set_masks = original
    assert steps == []


def test_l1_makes_exact_zeros_beyond_the_mask(worker: Worker) -> None:
    dense = dense_round(worker)
    tuned = Action(sparsity=0.1, finetune_tokens=TOKENS, learning_rate=1e-2)
    plain = run_round(worker, dense, tuned)
    shrunk = run_round(worker, dense, tuned.model_copy(update={"l1_lambda": 1.0}))
    assert plain.sparsity == pytest.approx(0.1, abs=1e-4)
    assert shrunk.sparsity > 0.12


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


def test_a_candidate_that_its_evaluation_refuses_leaves_nothing(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Diverged("worthless")

    monkeypatch.setattr(raysearch.trial.round, "check_quality", refuse)
    with pytest.raises(Diverged):
        run_round(worker, dense_round(worker), Action(sparsity=0.123))
    folder = worker.ledger.directory / "rounds"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert not worker.ledger.round_directory(round_key(worker.inputs.root_key, Action(sparsity=0.123))).exists()


def test_weights_are_copied_where_there_are_no_hard_links(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    record = run_round(worker, dense_round(worker), Action(sparsity=0.234))
    assert file_sha256(worker.ledger.weights_path(record.key)) == record.weights_sha256


def test_chance_and_nan_are_divergence() -> None:
    from raysearch.config import Metric

    check_quality({"text/token_perplexity": Metric(value=99.0, stderr=None, num_items=1)}, vocab_size=100)
    with pytest.raises(Diverged, match="quality at chance: token perplexity 100 is not below 100"):
        check_quality({"text/token_perplexity": Metric(value=100.0, stderr=None, num_items=1)}, vocab_size=100)


def test_fine_tuning_lowers_the_loss(worker: Worker) -> None:
    worker.engine.load_base()
    worker.loaded_key = None
    losses = [finetune(worker.engine, worker.inputs.blocks, Action(
                  sparsity=0.0, finetune_tokens=16 * TOKENS, learning_rate=3e-3, data_start_tokens=start), 0.1)
              for start in (0, 16 * TOKENS)]
    assert losses[1] < losses[0] - 0.1


# ---- the plan of a trial ----


def test_two_ways_to_say_it_share_one_plan(study: Study) -> None:
    by_rate = resolve_actions(TrialConfig(schedule="constant", rate=0.2, num_rounds=3), study, 10**6)
    by_target = resolve_actions(TrialConfig(schedule="exponential", target_sparsity=1 - 0.8**3, num_rounds=3), study, 10**6)
    assert by_rate == by_target
    untouched = TrialConfig(target_sparsity=0.5, learning_rate=1.0)
    assert resolve_actions(untouched, study, 10**6) == resolve_actions(TrialConfig(target_sparsity=0.5), study, 10**6)


def test_the_papers_rates_are_five_rounds(study: Study) -> None:
    keys = set()
    for target, num_rounds in ((0.1, 1), (0.3, 3), (0.5, 5)):
        key = "root"
        for action in resolve_actions(TrialConfig(schedule="linear", target_sparsity=target, num_rounds=num_rounds,
                                                  finetune_epochs=1.0), study, 10**6):
            key = round_key(key, action)
            keys.add(key)
    assert len(keys) == 5


def test_rounds_read_on_in_the_data(study: Study) -> None:
    actions = resolve_actions(TrialConfig(schedule="linear", target_sparsity=0.5, num_rounds=3, finetune_epochs=0.5), study,
                              10**6)
    assert [(a.data_start_tokens, a.finetune_tokens) for a in actions] == [(0, 512), (512, 512), (1024, 512)]


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"target_sparsity": 0.5, "finetune_epochs": 0.01}, "finetune_epochs must be 0 or make at least one step of 256 tokens"),
    ({"target_sparsity": 0.5, "l1_lambda": 0.1}, "l1_lambda acts during fine-tuning"),
    ({"threshold": 0.1, "num_rounds": 2}, "num_rounds with schedule one_shot must be 1, got 2"),
    ({"target_sparsity": 0.2, "initial_sparsity": 0.3}, "target_sparsity .*0.2"),
    ({"rate": 0.2, "target_sparsity": 0.5}, "rate"),
])
def test_contradictions_are_refused(study: Study, fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve_actions(TrialConfig(**fields), study, 10**6)


def test_scopes_cut_where_they_say(worker: Worker) -> None:
    def by_layer(scope: str) -> RoundRecord:
        return run_round(worker, dense_round(worker), Action(sparsity=0.35, scope=scope))

    for scope, spread in (("layer", 0.001), ("row", 0.02)):
        values = by_layer(scope).layer_sparsity.values()
        assert max(values) - min(values) < spread, scope
    assert max(by_layer("global").layer_sparsity.values()) - min(by_layer("global").layer_sparsity.values()) > 0.001
    load_candidate(worker, by_layer("row"))
    weight = worker.engine.gather("transformer.h.0.mlp.c_fc.weight")  # Conv1D keeps [inputs, outputs]
    zeros = (weight == 0).sum(0)
    assert zeros.min() == zeros.max() == round(0.35 * weight.shape[0])


def test_a_dominated_candidate_stops_being_scored_and_is_never_on_the_frontier(
        study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.evaluation.racing.FIRST_ITEMS", 2)
    racing = study.model_copy(update={"racing_level": 0.01})
    inputs = read_inputs(racing)
    assert inputs.root_key != read_inputs(study).root_key
    worker = Worker(racing, Ledger(tmp_path), inputs)
    dense = dense_round(worker)
    small = run_round(worker, dense, Action(sparsity=0.9))
    asked: list[tuple[list[float], list[float], float]] = []
    monkeypatch.setattr("raysearch.trial.worker.is_dominated", lambda *args: (asked.append(args), True)[1])
    larger = run_round(worker, dense, Action(sparsity=0.5))
    assert (dense.dominated_by, small.dominated_by, larger.dominated_by) == (None, None, small.key)
    assert dense.metrics[racing.objective].num_items > 2
    assert larger.metrics[racing.objective].num_items == 2
    assert {name.partition("/")[0] for name in larger.metrics} == {"text"}
    (own, rival, level), = asked
    assert len(own) == 2
    assert sorted(rival) == sorted(worker.ledger.losses(small.key))
    assert level == 0.01
    assert larger.key not in frontier_keys(worker.ledger, racing)
    assert not (worker.ledger.round_directory(larger.key) / "losses.json").exists()


def test_racing_changes_no_number_of_a_candidate_that_is_scored_in_full(worker: Worker, study: Study, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.evaluation.racing.FIRST_ITEMS", 2)
    racing = study.model_copy(update={"racing_level": 0.01})
    raced = dense_round(Worker(racing, Ledger(tmp_path), read_inputs(racing))).metrics
    for name, metric in dense_round(worker).metrics.items():
        assert raced[name].num_items == metric.num_items
        assert raced[name].value == pytest.approx(metric.value, rel=1e-5)
