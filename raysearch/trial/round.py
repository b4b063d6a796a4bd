"""A round is a pure function: round(parent candidate, action) -> candidate, found in the store or computed.

A round starts from its parent's weights with a fresh optimizer and its own span of the data, so nothing else can
influence it, and its key (ledger.round_key) names it for ever: resuming, extending and sharing a prefix are one mechanism.
"""

import time
from collections.abc import Callable, Sequence

import torch

from raysearch.config import Action, Metric, is_maximised
from raysearch.evaluation import Evaluation
from raysearch.models.model import check_causal
from raysearch.models.weights import read_sparse
from raysearch.study.ledger import Ledger
from raysearch.study.records import RoundRecord, round_key
from raysearch.study.storage import as_file
from raysearch.training.finetune import Diverged, finetune
from raysearch.training.hardware import threads
from raysearch.trial.candidate import intact, restore_items, store_round, store_weights, weigh, written_meanwhile
from raysearch.trial.pruner import Pruner
from raysearch.trial.worker import Worker, lone_worker

ROUNDING = 1e-5
"""Of a perplexity: with logits that are all equal it is the vocabulary's size but for the rounding of fp32."""


def run_round(worker: Worker, parent: RoundRecord, action: Action, raced: bool = True) -> RoundRecord:
    """The candidate after `action` on `parent`: from the store when it is there, else computed and stored.

    One that is not `raced` is scored in full also in a study with racing: a control, since others are measured against it.
    Raises Diverged, and then stores nothing.
    """
    key = round_key(parent.key, action)
    if (done := stored_round(worker, key)) is not None:
        return done
    train_loss, times = train_candidate(worker, parent, action)
    weighed = weigh(worker, action)
    with written_meanwhile(worker, key, weighed) as weights:
        race, rival = worker.race(getattr(weighed, worker.study.search.size) if raced else None)
        started = time.perf_counter()
        evaluation = worker.evaluate("selection", race)
        check_quality(evaluation, worker.study.search.objectives, worker.vocab_size)
        times += [started, time.perf_counter()]
        worker.loaded_key = key
        return store_round(worker, key, parent, action, weighed, evaluation, train_loss, times, weights,
                           rival if evaluation.was_stopped else None)


def dense_round(worker: Worker) -> RoundRecord:
    """The dense baseline: the root of every trial."""
    key = worker.inputs.root_key
    worker.latency()  # before anything else runs
    if (done := stored_round(worker, key)) is not None:
        return done
    worker.engine.load_base()
    worker.loaded_key = key
    started = time.perf_counter()
    try:
        if worker.inputs.tasks["selection"]:
            check_causal(worker.engine.model.eval())
        evaluation = worker.evaluate("selection", worker.race(None)[0])
        check_quality(evaluation, worker.study.search.objectives, worker.vocab_size)
    except Diverged as error:
        raise Diverged(f"the dense model: {error}") from error
    times = [started] * 4 + [time.perf_counter()]
    return store_round(worker, key, None, None, weigh(worker, None), evaluation, None, times, None)


def report_round(worker: Worker, record: RoundRecord) -> dict[str, Metric]:
    """The candidate's metrics on the report split, which no decision of the search has seen."""
    metrics = worker.engine.from_rank_0(lambda: worker.ledger.report_metrics(record.key))
    if metrics is None:
        load_candidate(worker, record)
        evaluation = worker.evaluate("report")
        metrics = evaluation.metrics
        worker.engine.from_rank_0(lambda: worker.ledger.write_report_metrics(record.key, metrics, evaluation.items))
    return metrics


def load_candidate(worker: Worker, record: RoundRecord) -> None:
    """Brings the engine to the candidate's weights, unless it holds them already.

    Where the file is damaged or gone, the weights are computed again from the parent's: a round is pure.
    """
    if worker.loaded_key == record.key:
        return
    worker.loaded_key = None
    if record.action is None:
        worker.engine.load_base()
    elif worker.engine.from_rank_0(lambda: intact(worker.ledger, record)):
        with as_file(worker.ledger.weights_path(record.key)) as file:
            worker.engine.load(read_sparse(file, None))
    else:
        assert record.parent is not None
        parent = worker.engine.from_rank_0(lambda: worker.ledger.candidate(record.parent))
        with threads(record.provenance.num_threads):
            train_candidate(worker, parent, record.action, record.provenance.micro_batch_tokens)
            store_weights(worker, record)
    worker.loaded_key = record.key


def mend_candidate(worker: Worker, actions: Sequence[Action], key: str, raced: bool) -> RoundRecord:
    """The candidate `key` of these actions with all of its files: what it has lost is computed again, what it has stays."""
    candidate = dense_round(worker)
    for action in actions:
        if candidate.key == key:
            break
        candidate = run_round(worker, candidate, action, raced)
    ledger, engine = worker.ledger, worker.engine
    if candidate.action is not None and not engine.from_rank_0(
            lambda: intact(ledger, candidate) or ledger.deleted_path(key).is_file()):
        worker.loaded_key = None
        load_candidate(worker, candidate)
    report = engine.from_rank_0(lambda: ledger.report_metrics(key))
    for split, metrics in (("selection", candidate.metrics), ("report", report)):
        path = ledger.items_path(key, split)
        if metrics and not engine.from_rank_0(path.is_file):
            load_candidate(worker, candidate)
            with threads(candidate.provenance.num_threads):
                evaluation = worker.evaluate(split, worker.same_race(candidate) if split == "selection" else None)
            engine.from_rank_0(lambda: restore_items(worker, candidate, path, evaluation.items))  # noqa: B023  called at once
    if report is None and engine.from_rank_0(ledger.items_path(key, "report").is_file):
        report_round(worker, candidate)
    return candidate


def recover_weights(ledger: Ledger, key: str, echo: Callable[[str], None]) -> None:
    """Computes a candidate's weights again, on one rank in this process, where their file is gone or damaged.

    Equal in every bit to those of a gang of one on the same device, whose number of threads is set; other gangs add in another
    order. Where bits differ, a line says so, and `recovered.json` beside the record holds the new file's hash.
    """
    record = ledger.candidate(key)
    if record.action is None or intact(ledger, record):
        return
    echo(f"the weights of candidate {key} are gone or damaged; computing them again, up to {record.depth} rounds ...")
    load_candidate(lone_worker(ledger, record, "its weights are gone, and they cannot be computed again"), record)


def train_candidate(worker: Worker, parent: RoundRecord, action: Action,
                    micro_tokens: int | None = None) -> tuple[float | None, list[float]]:
    """Brings the engine to the weights after `action` on `parent`; (training loss, clock before, between and after). Where
    memory runs out it starts again with smaller micro-batches, unless those are of one sequence. `micro_tokens`: those of
    the round that is computed again."""
    while True:
        try:
            return _train(worker, parent, action, micro_tokens or worker.micro_batch(action).tokens)
        except torch.OutOfMemoryError as error:
            failed, micro_tokens = error.with_traceback(None), None  # its frames hold what was in memory
        if not worker.halve_micro_batch():
            raise failed


def _train(worker: Worker, parent: RoundRecord, action: Action, micro_tokens: int) -> tuple[float | None, list[float]]:
    load_candidate(worker, parent)
    worker.loaded_key = None
    worker.engine.micro_sequences = micro_tokens // worker.study.data.context_tokens
    engine, times = worker.engine, [time.perf_counter()]
    torch.manual_seed(action.seed + engine.rank)  # of dropout, which many a model brings
    pruner = Pruner(engine, action, action.finetune_tokens // worker.study.training.batch_tokens, worker.inputs.blocks)
    engine.restart(action.l1_lambda, action.distill_alpha, action.temperature, action.distill_hidden, action.trainable)
    pruner.begin()
    times.append(time.perf_counter())
    train_loss = None
    if action.finetune_tokens:
        assert worker.inputs.blocks is not None
        first_step, after_step = 0, pruner.after_step
        if (checkpoints := worker.checkpoints) and checkpoints.key == round_key(parent.key, action):
            first_step, after_step = checkpoints.resume(engine, pruner.num_steps, after_step)
        warmup = worker.study.training.warmup_fraction
        train_loss = finetune(engine, worker.inputs.blocks, action, warmup, after_step, first_step)
        pruner.end()
    times.append(time.perf_counter())
    return train_loss, times


def check_quality(evaluation: Evaluation, objectives: Sequence[str], vocab_size: int) -> None:
    """Raises Diverged where the text, or the task of an objective ("task/metric"), is scored no better than by chance: a
    perplexity per token that a uniform guess over the vocabulary reaches, or generated answers none of which is right."""
    for task in ("text", *(objective.rpartition("/")[0] for objective in objectives)):
        if (perplexity := evaluation.perplexities.get(task, 0.0)) >= vocab_size * (1 - ROUNDING):
            raise Diverged(f"quality at chance: token perplexity {perplexity:.4g} is not below {vocab_size}, the size of the "
                           f"vocabulary, which a uniform guess reaches (task {task})")
    for objective in objectives:
        metric, generates = evaluation.metrics.get(objective), objective.rpartition("/")[0] not in evaluation.perplexities
        if metric is not None and generates and not evaluation.was_stopped and is_maximised(objective) and not metric.value:
            raise Diverged(f"quality at chance: {objective} is 0, which a model that knows nothing reaches")


def stored_round(worker: Worker, key: str) -> RoundRecord | None:
    """The record of a finished round; rank 0 looks, so that all ranks decide alike."""
    return worker.engine.from_rank_0(lambda: worker.ledger.round(key))
