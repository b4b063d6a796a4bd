"""A candidate on disk and in the engine: weighed, stored, found damaged.

Weights are written aside while the candidate is scored; the round's folder appears whole, with its record.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from raysearch.config import Action
from raysearch.evaluation import Evaluation
from raysearch.kernels.device import device_name
from raysearch.models.weights import Extent, WeightsFile, extent, to_store
from raysearch.study.files import (
    file_sha256,
    folder_aside,
    is_there,
    link_or_copy,
    new_directory,
    new_file,
    persist,
    set_aside,
    settle,
    write_record,
)
from raysearch.study.items import Items, write_items
from raysearch.study.ledger import WEIGHTS, Ledger
from raysearch.study.provenance import provenance
from raysearch.study.records import Provenance, Recovered, RoundRecord
from raysearch.study.storage import AnyPath, as_file
from raysearch.trial.sizes import Weighed, weighed
from raysearch.trial.worker import Worker

Written = Future[tuple[Path, str]]


def intact(ledger: Ledger, record: RoundRecord) -> bool:
    """Whether the candidate's weights are as they were written; a damaged file is moved aside."""
    path = ledger.weights_path(record.key)
    if not is_there(path):
        return False
    with as_file(path) as file:
        if file.is_file() and file_sha256(file) == ledger.expected_sha256(record, WEIGHTS):
            return True
    set_aside(path)
    return False


def store_weights(worker: Worker, record: RoundRecord) -> None:
    """The engine's weights as those of a candidate that has lost its file."""
    path, counted = worker.ledger.weights_path(record.key), weigh(worker, record.action)
    with written_meanwhile(worker, record.key, counted) as weights:

        def write() -> None:
            file, sha256 = weights.result()
            with new_file(path) as target:
                target.unlink(missing_ok=True)
                link_or_copy(file, target)
            worker.ledger.deleted_path(record.key).unlink(missing_ok=True)
            note_recovered(worker, record, WEIGHTS, sha256, counted.num_nonzero)

        worker.engine.from_rank_0(lambda: persist(path, write))


def restore_items(worker: Worker, record: RoundRecord, path: AnyPath, items: Mapping[str, Items]) -> None:
    """On rank 0: the items of a split of a candidate that has lost them."""
    persist(path, lambda: write_items(path, items))
    with as_file(path) as file:
        note_recovered(worker, record, path.name, file_sha256(file), record.num_nonzero)


def note_recovered(worker: Worker, record: RoundRecord, name: str, sha256: str, num_nonzero: int) -> None:
    """On rank 0, of a file that was computed again: where its bits differ, says so and keeps its hash apart from the record."""
    ledger, made = worker.ledger, provenance_of(worker)
    path = ledger.round_directory(record.key) / "recovered.json"
    if sha256 in (record.weights_sha256, record.items_sha256):  # as it was at first
        path.unlink(missing_ok=True)
    if sha256 == ledger.expected_sha256(record, name):
        return
    before = ledger.recovered(record.key)
    write_record(path, Recovered(sha256={**(before.sha256 if before else {}), name: sha256}, num_nonzero=num_nonzero,
                                 provenance=made))
    print(f"raysearch: candidate {record.key}: {name} was computed again and differs in bits from the lost one "
          f"({differences(record.provenance, made)}); its record keeps the numbers of the lost one", file=sys.stderr)


def differences(before: Provenance, now: Provenance) -> str:
    """In what may make other bits, in words."""
    pairs = {name: (getattr(before, name), getattr(now, name)) for name in
             ("device", "num_ranks", "zero_stage", "micro_batch_tokens", "compiled", "num_threads")}
    pairs |= {name: (before.versions.get(name), now.versions.get(name)) for name in ("torch", "deepspeed")}
    changed = [f"{name} {one}, now {other}" for name, (one, other) in pairs.items() if one != other]
    return "; ".join(changed) or "on what looks like the same device and gang"


def provenance_of(worker: Worker) -> Provenance:
    engine = worker.engine
    return provenance(device_name(str(engine.device)), num_ranks=engine.world_size, zero_stage=engine.zero_stage,
                      micro_batch_tokens=engine.micro_sequences * worker.study.data.context_tokens, compiled=engine.is_compiled,
                      num_threads=torch.get_num_threads())


def weigh(worker: Worker, action: Action | None) -> Weighed:
    """The engine's weights, which `action` made."""
    return weighed(worker.engine, worker.study.model.dtype, worker.latency(), action.pattern if action else "")


@contextlib.contextmanager
def written_meanwhile(worker: Worker, key: str, counted: Weighed) -> Iterator[Written | None]:
    """Writes the engine's weights, `counted`, aside: (file, sha256), once it is on disk, which it may be while the block runs.

    They are gathered and compressed one by one, on the engine's device; a thread of rank 0 writes one while the next is
    gathered, so that no more than two are in memory. What goes wrong there is raised where the result is taken.
    """
    engine, path = worker.engine, worker.ledger.weights_path(key)
    kept, nonzero = counted.kept, counted.nonzero

    def extent_of(name: str, shape: tuple[int, ...]) -> Extent:
        has_mask = name in engine.prunable_names or kept[name] < math.prod(shape)  # as `gather_mask` says
        return extent(shape, torch.float32, kept[name], nonzero[name] if has_mask else kept[name])

    with contextlib.ExitStack() as until_written:
        if engine.rank == 0:
            folder = until_written.enter_context(folder_aside(worker.ledger.round_directory(key)))
            thread = until_written.enter_context(ThreadPoolExecutor(1))
            file = WeightsFile(folder / path.name, {name: extent_of(name, shape) for name, shape in engine.shapes.items()})
            done = thread.submit(persist, path, file.begin)
        for name in engine.shapes:
            whole, mask = engine.gather(name), engine.gather_mask(name)  # collective
            if engine.rank == 0 and done.exception() is None:  # waits for the one before
                done = thread.submit(persist, path, functools.partial(file.write, name, to_store(whole, mask)))
        if engine.rank:
            yield None
            return

        def finish() -> tuple[Path, str]:
            done.result()
            sha256 = file_sha256(file.path)
            settle(file.path)
            return file.path, sha256

        yield thread.submit(persist, path, finish)


def store_round(worker: Worker, key: str, parent: RoundRecord | None, action: Action | None, counted: Weighed,
                evaluation: Evaluation | None, train_loss: float | None, times: Sequence[float], weights: Written | None,
                dominated_by: str | None = None) -> RoundRecord:
    """Writes the round's folder: weights, items and record.

    `times`: clock before and after the prune, after fine-tuning, before and after the evaluation.
    """
    engine, nonzero = worker.engine, counted.nonzero
    total = {name: math.prod(shape) for name, shape in engine.shapes.items()}
    prunable = {p.name for p in engine.prunables}
    num_parameters, num_prunable = sum(total.values()), sum(total[name] for name in prunable)

    def write(file: Path | None, sha256: str | None) -> RoundRecord:
        with new_directory(worker.ledger.round_directory(key), mend=True) as folder:
            if file:
                link_or_copy(file, folder / file.name)
            items_file = folder / worker.ledger.items_path(key, "selection").name
            if evaluation:
                write_items(items_file, evaluation.items)
            (worker.ledger.round_directory(key) / "recovered.json").unlink(missing_ok=True)  # of a record that was lost
            record = RoundRecord(
                key=key, parent=parent.key if parent else None, action=action, depth=parent.depth + 1 if parent else 0,
                num_parameters=num_parameters, num_prunable=num_prunable, num_nonzero=counted.num_nonzero,
                sparsity=sum(total[name] - nonzero[name] for name in prunable) / num_prunable,
                model_sparsity=(num_parameters - counted.num_nonzero) / num_parameters,
                layer_sparsity={name: (total[name] - nonzero[name]) / total[name] for name in total if name in prunable},
                stored_bytes=counted.stored_bytes, resident_bytes=counted.resident_bytes,
                compact_parameters=counted.compact_parameters, predicted_ms=counted.predicted_ms,
                metrics=evaluation.metrics if evaluation else {}, dominated_by=dominated_by, train_loss=train_loss,
                prune_s=times[1] - times[0], finetune_s=times[2] - times[1], evaluate_s=times[4] - times[3],
                weights_sha256=sha256, items_sha256=file_sha256(items_file) if evaluation else None,
                provenance=provenance_of(worker))
            write_record(folder / "record.json", record)
        worker.ledger.restore([f"rounds/{key}/record.json"])
        return worker.ledger.candidate(key)  # the other's record, where two trials made this round at once

    def store() -> RoundRecord:
        written = weights.result() if weights else (None, None)
        return persist(worker.ledger.round_directory(key), lambda: write(*written))

    return engine.from_rank_0(store)
