"""A round is a pure function: round(parent candidate, action) -> candidate, found in the store or computed.

A round starts from its parent's weights with a fresh optimizer and its own span of the data, so nothing else can
influence it, and its key (ledger.round_key) names it for ever: resuming, extending and sharing a prefix are one mechanism.
"""

import contextlib
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raysearch.bench import Bench, read_inputs
from raysearch.config import Action, Metric, Study, TrialConfig
from raysearch.engine import Engine, learning_rate_at
from raysearch.evaluation import Evaluation
from raysearch.kernels import SparseWeight, selection_passes
from raysearch.ledger import (
    Ledger,
    RoundRecord,
    TrialRecord,
    file_sha256,
    folder_aside,
    new_directory,
    new_file,
    persist,
    round_key,
    settle,
    write_json,
)
from raysearch.provenance import provenance, utc_now
from raysearch.pruning.criteria import moments, std_threshold
from raysearch.pruning.schedule import resolve_schedule
from raysearch.pruning.selection import keep_masks, num_to_prune, row_masks, threshold_masks
from raysearch.storage import as_file
from raysearch.weights import read_sparse, stored_bytes, to_store, write_weights

EXPORT_ITEMSIZE = {"float32": 4, "bfloat16": 2}
LOSS_CHECK_STEPS = 50
Written = Future[tuple[Path, str]]


class Diverged(Exception):
    """The candidate is worthless: a loss that is not finite, or quality no better than a uniform guess."""


class Superseded(Exception):
    """This gang was given up, for example behind a network that broke, and its trial was started again or ended since."""


def resolve_actions(config: TrialConfig, study: Study, num_train_tokens: int) -> tuple[Action, ...]:
    """The trial as a list of rounds; configurations that do the same thing give equal lists.

    `num_train_tokens` is the size of the train split (0 without a corpus). Raises ValueError for contradictions.
    """
    epoch_tokens = min(study.epoch_tokens or num_train_tokens, num_train_tokens)
    num_steps = round(config.finetune_epochs * epoch_tokens / study.batch_tokens)
    if config.finetune_epochs and not num_steps:
        raise ValueError(f"finetune_epochs must be 0 or make at least one step of {study.batch_tokens} tokens, got "
                         f"{config.finetune_epochs:g} epochs of {epoch_tokens} tokens; raise it, or give a corpus")
    if config.l1_lambda and not num_steps:
        raise ValueError(f"l1_lambda acts during fine-tuning, so finetune_epochs must be above 0 with it, got l1_lambda "
                         f"{config.l1_lambda:g} and finetune_epochs 0")
    if config.threshold is not None:
        num_rounds = config.num_rounds or 1
        if config.schedule == "one_shot" and num_rounds > 1:
            raise ValueError(f"num_rounds with schedule one_shot must be 1, got {num_rounds}; linear raises the "
                             "threshold over the rounds")
        cuts = [{"threshold": round(config.threshold * k / num_rounds, 12)} for k in range(1, num_rounds + 1)]
    else:
        cuts = [{"sparsity": sparsity} for sparsity in resolve_schedule(
            config.schedule, initial_sparsity=config.initial_sparsity, target_sparsity=config.target_sparsity,
            num_rounds=config.num_rounds, rate=config.rate)]
    fixed = config.model_dump(include={"criterion", "pattern", "scope", "threshold_unit"})
    if num_steps:
        fixed |= {"l1_lambda": config.l1_lambda, "learning_rate": config.learning_rate, "seed": study.seed}
    tokens = num_steps * study.batch_tokens
    return tuple(Action(**fixed, **cut, finetune_tokens=tokens, data_start_tokens=index * tokens)
                 for index, cut in enumerate(cuts))


def run_trial(bench: Bench, trial: TrialRecord) -> Iterator[TrialRecord]:
    """Runs the trial's actions; yields its record, already written, after every round and at the end.

    A diverged trial ends as failed. Any other error is recorded as failed and raised: the gang may be out of step. Raises
    Superseded, and leaves the record, where another gang has begun the trial since.
    """
    started = time.perf_counter()

    def write(**changes: object) -> None:
        nonlocal trial
        trial = trial.model_copy(update={**changes, "seconds": round(time.perf_counter() - started, 3)})
        if bench.engine.rank == 0:
            bench.ledger.write_trial(trial)

    def update(**changes: object) -> TrialRecord:
        if bench.engine.rank == 0:
            found = bench.ledger.trial(trial.number)
            if (found.started_at, found.status) != (trial.started_at, "running"):
                raise Superseded(f"trial {trial.number} was begun here at {trial.started_at}, but its record is of another "
                                 f"gang now ({found.status}, begun at {found.started_at}); nothing is written")
        write(**changes)
        return trial

    write(status="running", keys=(), reason=None, traceback=None, ended_at=None, started_at=utc_now())
    try:
        candidate = dense_round(bench)
        for action in trial.actions:
            candidate = run_round(bench, candidate, action)
            yield update(keys=(*trial.keys, candidate.key))
        yield update(status="done", ended_at=utc_now())
    except Diverged as error:
        yield update(status="failed", reason=f"round {len(trial.keys) + 1}: {error}", ended_at=utc_now())
    except Exception as error:
        update(status="failed", reason=f"round {len(trial.keys) + 1}: {type(error).__name__}: {error}{advice(error)}",
               traceback=traceback.format_exc(), ended_at=utc_now())
        raise


def advice(error: Exception) -> str:
    """What to do about an error of a trial, where we know."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return ("; the trial needs more memory than there is: lower batch_tokens, or shard it over more ranks with "
                "num_ranks and zero_stage")
    return ""


def run_round(bench: Bench, parent: RoundRecord, action: Action) -> RoundRecord:
    """The candidate after `action` on `parent`: from the store when it is there, else computed and stored.

    Raises Diverged, and then stores nothing.
    """
    key = round_key(parent.key, action)
    if (done := stored_round(bench, key)) is not None:
        return done
    train_loss, times = train_candidate(bench, parent, action)
    weighed = weigh(bench)
    with written_meanwhile(bench, key) as weights:
        race, rival = bench.race(getattr(weighed, bench.study.size))
        started = time.perf_counter()
        evaluation = bench.evaluate("selection", race)
        check_quality(evaluation.metrics, bench.vocab_size)
        times += [started, time.perf_counter()]
        bench.loaded_key = key
        return store_round(bench, key, parent, action, weighed, evaluation, train_loss, times, weights,
                           rival if evaluation.was_stopped else None)


def dense_round(bench: Bench) -> RoundRecord:
    """The dense baseline: the root of every trial."""
    key = bench.inputs.root_key
    if (done := stored_round(bench, key)) is not None:
        return done
    bench.engine.load_base()
    bench.loaded_key = key
    started = time.perf_counter()
    evaluation = bench.evaluate("selection", bench.race(None)[0])
    check_quality(evaluation.metrics, bench.vocab_size)
    return store_round(bench, key, None, None, weigh(bench), evaluation, None, [started] * 4 + [time.perf_counter()], None)


def report_round(bench: Bench, record: RoundRecord) -> dict[str, Metric]:
    """The candidate's metrics on the report split, which no decision of the search has seen."""
    metrics = bench.engine.from_rank_0(lambda: bench.ledger.report_metrics(record.key))
    if metrics is None:
        load_candidate(bench, record)
        metrics = bench.evaluate("report").metrics
        bench.engine.from_rank_0(lambda: bench.ledger.write_report_metrics(record.key, metrics))
    return metrics


# ---- the steps of a round ----


def load_candidate(bench: Bench, record: RoundRecord) -> None:
    """Brings the engine to the candidate's weights, unless it holds them already.

    Where the file is damaged or gone, the weights are computed again from the parent's: a round is pure.
    """
    if bench.loaded_key == record.key:
        return
    bench.loaded_key = None
    if record.action is None:
        bench.engine.load_base()
    elif bench.engine.from_rank_0(lambda: intact(bench.ledger, record)):
        with as_file(bench.ledger.weights_path(record.key)) as file:
            bench.engine.load(read_sparse(file, None))
    else:
        assert record.parent is not None
        train_candidate(bench, bench.engine.from_rank_0(lambda: bench.ledger.candidate(record.parent)), record.action)
        store_weights(bench, record)
    bench.loaded_key = record.key


def recover_weights(ledger: Ledger, key: str, echo: Callable[[str], None]) -> None:
    """Computes a candidate's weights again, on one rank in this process, where their file is gone or damaged.

    Equal in every bit to those of a gang of one on the same device; other gangs add in another order.
    """
    record = ledger.candidate(key)
    if record.action is None or intact(ledger, record):
        return
    described = ledger.study()
    if not described.study.gpus_per_rank:
        os.environ["DS_ACCELERATOR"] = "cpu"
    inputs = read_inputs(described.study)
    if inputs.root_key != described.root_key:
        raise ValueError(f"candidate {key}: its weights are gone, and they cannot be computed again because the files of the "
                         "model, the corpus or the tasks are not the study's; put those back")
    echo(f"the weights of candidate {key} are gone or damaged; computing them again, up to {record.depth} rounds ...")
    study = described.study.model_copy(update={"num_ranks": 1, "zero_stage": 0})
    load_candidate(Bench(study, ledger, inputs), record)


def intact(ledger: Ledger, record: RoundRecord) -> bool:
    """Whether the candidate's weights are as they were written; a damaged file is moved aside."""
    path = ledger.weights_path(record.key)
    if not path.is_file():
        return False
    with as_file(path) as file:
        if file_sha256(file) == record.weights_sha256:
            return True
    path.replace(path.with_suffix(".damaged"))
    return False


def store_weights(bench: Bench, record: RoundRecord) -> None:
    """The engine's weights as those of a candidate that has lost its file."""
    weights, path = candidate_weights(bench), bench.ledger.weights_path(record.key)

    def write() -> None:
        with new_file(path) as file:
            sha256 = write_weights(file, weights)
        write_json(path.parent / "record.json", record.model_copy(update={"weights_sha256": sha256}).model_dump(mode="json"))

    bench.engine.from_rank_0(lambda: persist(path, write))


def candidate_weights(bench: Bench) -> dict[str, Tensor | SparseWeight]:
    """The engine's weights as they are stored, on rank 0: gathered and compressed one by one, on the engine's device."""
    engine, prunable = bench.engine, {p.name for p in bench.engine.prunables}
    weights = {}
    for name in engine.shapes:
        whole = engine.full(name)  # collective
        if engine.rank == 0:
            weights[name] = to_store(whole, name in prunable)
    return weights


def train_candidate(bench: Bench, parent: RoundRecord, action: Action) -> tuple[float | None, list[float]]:
    """Brings the engine to the weights after `action` on `parent`; (training loss, clock before, between and after)."""
    load_candidate(bench, parent)
    bench.loaded_key = None
    times = [time.perf_counter()]
    bench.engine.prune(select(bench.engine, action))
    times.append(time.perf_counter())
    train_loss = finetune(bench, action)
    times.append(time.perf_counter())
    return train_loss, times


def select(engine: Engine, action: Action) -> list[Tensor]:
    """Keep masks [n] for the engine's prunable pieces, by the action's threshold, or by its sparsity and scope."""
    pieces = engine.prunable_pieces
    own = {p.name: [piece for piece in pieces if piece.name == p.name] for p in engine.prunables}
    if action.threshold is not None:
        cut = {name: action.threshold for name in own}
        if action.threshold_unit == "std":
            for name, shards in own.items():
                sums = engine.all_reduce(moments([piece.values for piece in shards]).to(engine.device))
                cut[name] = std_threshold(action.threshold, *sums.tolist())
        return threshold_masks([piece.values for piece in pieces], [cut[piece.name] for piece in pieces])
    assert action.sparsity is not None
    rank, world_size = engine.shard_rank
    passes = selection_passes(engine.device)
    if action.scope == "global":
        num_prune = num_to_prune(action.sparsity, sum(math.prod(p.shape) for p in engine.prunables))
        return keep_masks([piece.values for piece in pieces], [piece.index for piece in pieces], num_prune,
                          all_reduce=engine.all_reduce, rank=rank, world_size=world_size, passes=passes)
    keep: dict[str, Tensor] = {}
    for prunable in engine.prunables:
        shards = [piece.values for piece in own[prunable.name]]
        if action.scope == "layer":
            num_prune = num_to_prune(action.sparsity, math.prod(prunable.shape))
            (keep[prunable.name],) = keep_masks(shards or [torch.empty(0, device=engine.device)], [0], num_prune,
                                                all_reduce=engine.all_reduce, rank=rank, world_size=world_size, passes=passes)
        else:
            whole = engine.full(prunable.name)
            rows = whole.T if prunable.transposed else whole  # [outputs, inputs]
            mask = row_masks(rows, num_to_prune(action.sparsity, rows.shape[1]))
            flat = (mask.T if prunable.transposed else mask).reshape(-1)
            for piece in own[prunable.name]:
                keep[prunable.name] = flat[piece.start:piece.start + piece.values.numel()]
    return [keep[piece.name] for piece in pieces]


def finetune(bench: Bench, action: Action) -> float | None:
    """Trains the surviving weights on the action's span of the data; the mean loss of the last tenth of the steps."""
    if not action.finetune_tokens:
        return None
    study, engine = bench.study, bench.engine
    assert bench.inputs.blocks is not None
    num_steps = action.finetune_tokens // study.batch_tokens
    first = action.data_start_tokens // study.context_tokens + engine.rank * engine.sequences_per_rank
    losses: list[Tensor] = []
    engine.restart(action.l1_lambda)
    for step in range(num_steps):
        start = first + step * engine.sequences_per_rank * engine.world_size
        tokens = bench.inputs.blocks.stream(start, engine.sequences_per_rank, action.seed)
        rate = learning_rate_at(step, num_steps, action.learning_rate, round(num_steps * study.warmup_fraction))
        losses.append(engine.train_step(tokens, rate))
        if step % LOSS_CHECK_STEPS == LOSS_CHECK_STEPS - 1 or step == num_steps - 1:
            tail = engine.mean(torch.stack(losses[-max(1, num_steps // 10):]).mean())
            if not math.isfinite(tail):
                raise Diverged(f"the training loss became {tail} within {step + 1} of {num_steps} steps at learning rate "
                               f"{action.learning_rate:g}")
    return tail


def check_quality(metrics: dict[str, Metric], vocab_size: int) -> None:
    """Raises Diverged for numbers that are not finite and for a token perplexity that a uniform guess reaches."""
    for name, metric in metrics.items():
        if not math.isfinite(metric.value):
            raise Diverged(f"{name} is {metric.value}")
    perplexity = metrics.get("text/token_perplexity")
    if perplexity is not None and perplexity.value >= vocab_size:
        raise Diverged(f"quality at chance: token perplexity {perplexity.value:.0f} is not below {vocab_size}, the size "
                       "of the vocabulary, which a uniform guess reaches")


def stored_round(bench: Bench, key: str) -> RoundRecord | None:
    """The record of a finished round; rank 0 looks, so that all ranks decide alike."""
    return bench.engine.from_rank_0(lambda: bench.ledger.round(key))


@dataclass(frozen=True)
class Weighed:
    """The engine's weights, counted."""

    nonzero: dict[str, int]
    """By parameter."""
    num_nonzero: int
    stored_bytes: int


def weigh(bench: Bench) -> Weighed:
    engine, itemsize = bench.engine, EXPORT_ITEMSIZE[bench.study.dtype]
    nonzero, prunable = engine.nonzero_counts(), {p.name for p in engine.prunables}
    total = {name: math.prod(shape) for name, shape in engine.shapes.items()}
    return Weighed(nonzero, sum(nonzero.values()), sum(
        stored_bytes(total[name], nonzero[name], itemsize) if name in prunable else total[name] * itemsize for name in total))


@contextlib.contextmanager
def written_meanwhile(bench: Bench, key: str) -> Iterator[Written | None]:
    """Writes the engine's weights aside while the block runs, in a thread of rank 0: (file, sha256), once it is on disk."""
    weights = candidate_weights(bench)
    if bench.engine.rank:
        yield None
        return
    path = bench.ledger.weights_path(key)
    with folder_aside(bench.ledger.round_directory(key)) as folder, ThreadPoolExecutor(1) as thread:

        def write() -> tuple[Path, str]:
            file = folder / path.name
            sha256 = write_weights(file, weights)
            settle(file)
            return file, sha256

        yield thread.submit(persist, path, write)


def link_or_copy(file: Path, target: Path) -> None:
    """One content under two names, where the filesystem has hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def store_round(bench: Bench, key: str, parent: RoundRecord | None, action: Action | None, weighed: Weighed,
                evaluation: Evaluation | None, train_loss: float | None, times: Sequence[float], weights: Written | None,
                dominated_by: str | None = None) -> RoundRecord:
    """Writes the round's folder: weights, record and, for later races, losses.

    `times`: clock before and after the prune, after fine-tuning, before and after the evaluation.
    """
    engine, nonzero = bench.engine, weighed.nonzero
    total = {name: math.prod(shape) for name, shape in engine.shapes.items()}
    prunable = {p.name for p in engine.prunables}
    num_parameters, num_prunable = sum(total.values()), sum(total[name] for name in prunable)

    def write(file: Path | None, sha256: str | None) -> RoundRecord:
        with new_directory(bench.ledger.round_directory(key)) as folder:
            if file:
                link_or_copy(file, folder / file.name)
            record = RoundRecord(
                key=key, parent=parent.key if parent else None, action=action, depth=parent.depth + 1 if parent else 0,
                num_parameters=num_parameters, num_prunable=num_prunable, num_nonzero=weighed.num_nonzero,
                sparsity=sum(total[name] - nonzero[name] for name in prunable) / num_prunable,
                model_sparsity=(num_parameters - weighed.num_nonzero) / num_parameters,
                layer_sparsity={name: (total[name] - nonzero[name]) / total[name] for name in total if name in prunable},
                stored_bytes=weighed.stored_bytes, resident_bytes=num_parameters * EXPORT_ITEMSIZE[bench.study.dtype],
                metrics=evaluation.metrics if evaluation else {}, dominated_by=dominated_by, train_loss=train_loss,
                prune_s=times[1] - times[0], finetune_s=times[2] - times[1], evaluate_s=times[4] - times[3],
                weights_sha256=sha256, provenance=provenance(str(engine.device)))
            if evaluation and evaluation.losses and dominated_by is None:
                write_json(folder / "losses.json", {"objective": bench.study.objective, "losses": evaluation.losses})
            write_json(folder / "record.json", record.model_dump(mode="json"))
        return bench.ledger.candidate(key)  # the other's record, where two trials made this round at once

    def store() -> RoundRecord:
        written = weights.result() if weights else (None, None)
        return persist(bench.ledger.round_directory(key), lambda: write(*written))

    return engine.from_rank_0(store)
