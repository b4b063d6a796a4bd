"""Rounds on a real engine, in this process."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raysearch.study.ledger
import raysearch.trial.round
from raysearch.cluster.placement import USABLE, MicroBatch, rank_bytes
from raysearch.config import Action, Metric, Study
from raysearch.evaluation import Evaluation
from raysearch.evaluation.evaluating import aggregation_of
from raysearch.evaluation.statistics import FORMS, estimate
from raysearch.models.model import model_size
from raysearch.study.ledger import Ledger
from raysearch.study.records import round_key
from raysearch.training.finetune import Diverged
from raysearch.trial.inputs import read_inputs
from raysearch.trial.round import check_quality, dense_round, report_round, run_round, train_candidate
from raysearch.trial.worker import Worker

TOKENS = 64 * 16


def weights_of(worker: Worker) -> dict[str, torch.Tensor]:
    return {name: worker.engine.gather(name).clone() for name in worker.engine.shapes}


def test_sparsity_zero_reproduces_the_dense_metrics(worker: Worker) -> None:
    dense = dense_round(worker)
    same = run_round(worker, dense, Action(sparsity=0.0))
    assert same.metrics == dense.metrics
    assert report_round(worker, same) == report_round(worker, dense)
    for split in ("selection", "report"):
        one, other = (worker.ledger.items(record.key, split) for record in (same, dense))
        assert list(one) == list(other)
        assert all(np.array_equal(a, b) for name in one for a, b in zip(one[name], other[name]))
    assert (same.sparsity, same.num_nonzero) == (0.0, dense.num_nonzero)


def test_dropout_is_the_rounds_own(worker: Worker) -> None:
    dense, action = dense_round(worker), Action(sparsity=0.3, finetune_tokens=TOKENS, learning_rate=1e-3)
    modules = [module for module in worker.engine.model.modules() if isinstance(module, torch.nn.Dropout)]
    found = []
    for p, drawn_before in ((0.2, 0), (0.2, 100), (0.0, 0)):
        for module in modules:
            module.p = p
        torch.rand(drawn_before)
        train_candidate(worker, dense, action)
        found.append(weights_of(worker))
    first, again, without = found
    assert all(torch.equal(again[name], weights) for name, weights in first.items())
    assert not all(torch.equal(without[name], weights) for name, weights in first.items())


def test_metrics_of_both_splits_come_from_the_stored_items(worker: Worker) -> None:
    record = run_round(worker, dense_round(worker), Action(sparsity=0.45))
    report = report_round(worker, record)
    forms = {name: FORMS[aggregation_of(task, name.rpartition("/")[2])] for task in worker.inputs.tasks["selection"]
             for name in record.metrics if name.startswith(task.config.task + "/")}
    for split, metrics in (("selection", record.metrics), ("report", report)):
        items = worker.ledger.items(record.key, split)
        assert {name: estimate(items[name], form) for name, form in forms.items()} == {
            name: (metric.value, metric.stderr) for name, metric in metrics.items()}
        assert {name: len(columns.item) for name, columns in items.items()} == {
            name: metric.num_items for name, metric in metrics.items()}
    documents = [set(worker.ledger.items(record.key, split)["text/bits_per_byte"].cluster.tolist())
                 for split in ("selection", "report")]
    assert documents[0].isdisjoint(documents[1])


def test_a_report_never_stands_without_its_items(apart: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_round(apart)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(raysearch.study.ledger, "write_items", killed)
        report_round(apart, dense)
    assert apart.ledger.report_metrics(dense.key) is None
    assert apart.ledger.items(dense.key, "report") is None
    report = report_round(apart, dense)
    assert apart.ledger.report_metrics(dense.key) == report
    assert set(apart.ledger.items(dense.key, "report")) == set(report)


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


def test_a_round_that_runs_out_of_memory_is_tried_with_half_as_much(apart: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    action = Action(sparsity=0.3, finetune_tokens=3 * TOKENS, learning_rate=1e-3, seed=3)
    monkeypatch.setattr(apart, "_fits", None)  # and again behind this test: others share the workbench
    dense = dense_round(apart)
    wanted = run_round(apart, dense, action)
    weights = weights_of(apart)
    assert wanted.provenance.micro_batch_tokens == 4 * apart.study.data.context_tokens
    forward, calls = apart.engine._layout.forward, itertools.count(1)

    def full(**inputs: object) -> torch.Tensor:
        if inputs["input_ids"].shape[0] > 1 and next(calls) >= 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(**inputs)

    monkeypatch.setattr(apart.engine._layout, "forward", full)
    shutil.rmtree(apart.ledger.round_directory(wanted.key))
    apart.ledger.twins(f"rounds/{wanted.key}/record.json")[1].unlink()
    again = run_round(apart, dense, action)
    assert next(calls) > 7
    assert again.provenance.micro_batch_tokens == apart.study.data.context_tokens
    assert (again.num_nonzero, again.train_loss) == (wanted.num_nonzero, pytest.approx(wanted.train_loss, rel=1e-5))
    for name, weight in weights_of(apart).items():
        if weight.dim() == 2:  # the gradient of a key's bias is nothing but rounding, which Adam makes large
            assert torch.allclose(weight, weights[name], rtol=1e-3, atol=1e-4), name
    assert Worker(apart.study, apart.ledger, apart.inputs).engine.micro_sequences == 1  # the study remembers
    monkeypatch.setattr(apart.engine._layout, "forward", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):  # a sequence by itself
        run_round(apart, dense, action.model_copy(update={"seed": 4}))


def test_a_round_that_distils_takes_fewer_tokens_at_a_time_where_the_teacher_needs_the_memory(
        study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, size, context_tokens = Worker(study, Ledger(tmp_path), read_inputs(study)), model_size(study.model.path), 64
    need = rank_bytes(size, num_ranks=1, zero_stage=0, dtype="float32", micro_batch=MicroBatch(4 * context_tokens, False))
    monkeypatch.setattr("raysearch.trial.worker.memory_bytes", lambda: 1.01 * sum(need.values()) / USABLE)
    tokens = []
    for alpha in (0.0, 0.5, 0.0):
        action = Action(sparsity=0.1, finetune_tokens=TOKENS, learning_rate=1e-3, distill_alpha=alpha, seed=len(tokens))
        tokens.append(run_round(worker, dense_round(worker), action).provenance.micro_batch_tokens)
    assert tokens[0] == tokens[2] == 4 * context_tokens
    assert tokens[1] == 2 * context_tokens


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


def test_a_candidate_that_its_evaluation_refuses_leaves_nothing(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Diverged("worthless")

    monkeypatch.setattr(raysearch.trial.round, "check_quality", refuse)
    with pytest.raises(Diverged):
        run_round(worker, dense_round(worker), Action(sparsity=0.123))
    folder = worker.ledger.directory / "rounds"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert not worker.ledger.round_directory(round_key(worker.inputs.root_key, Action(sparsity=0.123))).exists()


def evaluation(perplexities: dict[str, float], was_stopped: bool = False, **values: float) -> Evaluation:
    metrics = {name.replace("_", "/", 1): Metric(value=value, stderr=None, num_items=1) for name, value in values.items()}
    return Evaluation(metrics, {}, perplexities, was_stopped)


def test_chance_is_divergence_for_the_task_of_every_objective() -> None:
    sizes = ("num_nonzero",)
    check_quality(evaluation({"text": 99.0, "other": 1e300}), sizes, vocab_size=100)
    with pytest.raises(Diverged, match=r"quality at chance: token perplexity 100 is not below 100, .* \(task text\)"):
        check_quality(evaluation({"text": 100.0}), sizes, vocab_size=100)
    for objective in ("lambada/acc", "lambada/perplexity"):
        with pytest.raises(Diverged, match=r"token perplexity inf is not below 100.*\(task lambada\)"):
            check_quality(evaluation({"text": 9.0, "lambada": float("inf")}, lambada_acc=0.2), (*sizes, objective), 100)
    check_quality(evaluation({"lambada": 9.0}, lambada_acc=0.0), (*sizes, "lambada/acc"), 100)
    generated = (*sizes, "squad/exact_match")
    check_quality(evaluation({}, squad_exact_match=0.01), generated, 100)
    check_quality(evaluation({}, was_stopped=True, squad_exact_match=0.0), generated, 100)
    with pytest.raises(Diverged, match="quality at chance: squad/exact_match is 0, which a model that knows nothing reaches"):
        check_quality(evaluation({}, squad_exact_match=0.0), generated, 100)


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda weight: weight.fill_(torch.nan), "log-probability of item 0 of task text is nan: the model gives no numbers"),
    (lambda weight: weight.fill_(torch.inf), "is nan: the model gives no numbers"),
    (lambda weight: weight.mul_(1e30), "is -?(nan|inf)"),
    (lambda weight: weight.normal_(0, 1), "quality at chance: token perplexity .* is not below 257"),
], ids=["NaN", "infinite", "too large", "senseless"])
def test_a_model_without_numbers_is_diverged_and_leaves_no_round(apart: Worker, monkeypatch: pytest.MonkeyPatch, spoil: Any,
                                                                 reason: str) -> None:
    """As after one step at a learning rate of 1e30, whose loss was still fine."""
    dense, action = dense_round(apart), Action(sparsity=0.1, finetune_tokens=256, learning_rate=1e-3)

    def broken_training(*_: object) -> float:
        with torch.no_grad():
            for shard in apart.engine.shards:
                spoil(shard.values)
        apart.engine.sync()
        return 3.0

    monkeypatch.setattr(raysearch.trial.round, "finetune", broken_training)
    with pytest.raises(Diverged, match=reason):
        run_round(apart, dense, action)
    assert apart.ledger.round(round_key(dense.key, action)) is None
