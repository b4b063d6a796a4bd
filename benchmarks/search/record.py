"""Rounds of a real space for the search benchmark, recorded: random configurations, pruned and trained for real.

    python benchmarks/search/record.py benchmarks/search/tiny.parquet [--model DIR] [--limit-s 600] [--seed 0]
    python benchmarks/search/record.py OUT/$SEED.parquet --space search_spaces.books_30m --divide-tokens 8 --seed $SEED
    python benchmarks/search/record.py benchmarks/search/books_30m.parquet --join OUT/*.parquet

Random configurations run round by round in one warm process with one thread, on the GPU where there is one. After each comes a
fork: one random round on a random candidate of before, so that a surrogate of single rounds sees parents that no configuration
leads to. A row is a round; a diverged one has no size and no quality. Seconds are the processor's, on a GPU those of the wall
clock. The table is written after every trial, and one that is there is made longer: give another seed, and a table to each of
several processes. The demo's model is what `raysearch pretrain` makes of the tiny preset, and is trained first where there is
none. Ends with one JSON line.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raysearch.config import Action, Study
from raysearch.kernels.device import device_name
from raysearch.search.space import draw, load_space
from raysearch.study.files import new_file
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import versions
from raysearch.study.records import RoundRecord
from raysearch.training.finetune import Diverged
from raysearch.training.hardware import device_type
from raysearch.trial.actions import resolve_actions
from raysearch.trial.inputs import read_inputs, resolve
from raysearch.trial.round import dense_round, run_round
from raysearch.trial.worker import Worker

OBJECTIVE = "text/bits_per_byte"
MAX_KEPT = 64
"""Candidates whose weights stay on the disk, as parents of forks."""


def main() -> None:
    parser = argparse.ArgumentParser(description="record random rounds of a space")
    parser.add_argument("table", type=Path)
    parser.add_argument("--space", default="search_spaces.demo")
    parser.add_argument("--model", type=Path, help="instead of the space's")
    parser.add_argument("--divide-tokens", type=int, default=1, metavar="N", help="epochs and batches of a Nth: as many steps")
    parser.add_argument("--limit-s", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--join", type=Path, nargs="+", metavar="TABLE", help="put these into one, and record nothing")
    options = parser.parse_args()
    try:
        tables = [pq.read_table(file) for file in options.join or [options.table] if options.join or file.exists()]
        if options.join:
            write(options.table, tables)
        else:
            record_table(options, tables)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    table = pq.read_table(options.table)
    rows, schema = table.to_pylist(), {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    print(json.dumps({"benchmark": "search/record", **schema, "study": schema["space"], "num_rounds": len(rows), **versions(),
                      "num_trials": len({(row["seed"], row["trial"]) for row in rows if row["trial"] is not None}),
                      "num_diverged": sum(row["num_nonzero"] is None for row in rows)}))


def record_table(options: argparse.Namespace, tables: list[pa.Table]) -> None:
    """Writes the table after every trial; `tables`: what it held before."""
    torch.set_num_threads(1)
    study, space = load_space(options.space)
    model = (options.model or Path(study.model.path)).resolve()
    if options.space == "search_spaces.demo" and not model.exists():
        from raysearch.training.pretrain import pretrain

        pretrain("tiny", "builtin", model, echo=print)
    assert study.data.epoch_tokens is not None
    study = resolve(study.replaced(
        path=str(model), tasks=("text",), epoch_tokens=study.data.epoch_tokens // options.divide_tokens,
        batch_tokens=study.training.batch_tokens // options.divide_tokens, compile=False), print)
    schema = {"space": options.space, "device": device_name(device_type()), "date": date.today().isoformat(),
              "study": study.model_dump_json()}
    with tempfile.TemporaryDirectory(prefix="raysearch-record-") as folder:
        for rows in record(study, space, Path(folder), options.limit_s, options.seed):
            write(options.table, [*tables, pa.Table.from_pylist(rows).replace_schema_metadata(schema)])


def write(file: Path, tables: list[pa.Table]) -> None:
    """All rows, under the first's dense baseline; ValueError for other tables than of one study, and of one seed each."""
    studies = {(table.schema.metadata[b"space"],
                Study.model_validate_json(table.schema.metadata[b"study"]).replaced(path="model").model_dump_json())
               for table in tables}
    seeds = [seed for table in tables for seed in set(table["seed"].to_pylist())]
    if len(studies) > 1 or len(set(seeds)) < len(seeds):
        raise ValueError(f"tables must be of one space and its settings, each of other seeds, got {len(studies)} and the seeds "
                         f"{sorted(seeds)}; give another --seed, or another table")
    whole = pa.concat_tables([table.replace_schema_metadata()[bool(number):] for number, table in enumerate(tables)],
                             promote_options="permissive")
    with new_file(file) as aside:
        pq.write_table(whole.replace_schema_metadata(tables[-1].schema.metadata), aside, compression="zstd")


def record(study: Study, space: Any, folder: Path, limit_s: float, seed: int) -> Iterator[list[dict[str, Any]]]:
    """All rounds so far, after each trial until the time is up; the dense baseline first."""
    inputs = read_inputs(study)
    worker, rng = Worker(study, Ledger(folder), inputs), random.Random(seed)
    dense = dense_round(worker)
    rows, candidates, began = [row(seed, None, dense, dense.key, None, None, 0.0)], [dense], time.monotonic()
    clock = time.process_time if device_type() == "cpu" else time.perf_counter
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    asked = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    yield rows

    def step(trial: int | None, parent: RoundRecord, action: Action) -> RoundRecord | None:
        started = clock()
        try:
            done = run_round(worker, parent, action)
        except Diverged:
            done = None
        rows.append(row(seed, trial, done, None if done is None else done.key, parent.key, action, clock() - started))
        if done is not None:
            candidates.append(done)
        return done

    while time.monotonic() - began < limit_s:
        trial, candidate = asked.ask(), dense
        for action in resolve_actions(draw(space, trial), study, inputs.num_train_tokens):
            if candidate is not None:
                candidate = step(trial.number, candidate, action)
        parent = rng.choice(candidates)
        action = resolve_actions(draw(space, asked.ask()), study, inputs.num_train_tokens)[0]
        if action.sparsity is not None:
            action = action.model_copy(update={"sparsity": round(rng.uniform(parent.sparsity, 0.95), 12)})
        step(None, parent, action)
        while len(candidates) > MAX_KEPT:
            worker.ledger.weights_path(candidates.pop(rng.randrange(1, len(candidates))).key).unlink(missing_ok=True)
        yield rows


def row(seed: int, trial: int | None, done: RoundRecord | None, key: str | None, parent: str | None, action: Action | None,
        seconds: float) -> dict[str, Any]:
    metric = done and done.metrics[OBJECTIVE]
    return {"seed": seed, "trial": trial, "key": key, "parent": parent,
            "action": action and action.model_dump_json(exclude_defaults=True),
            "num_nonzero": done and done.num_nonzero, "num_parameters": done and done.num_parameters,
            "num_prunable": done and done.num_prunable, "sparsity": done and done.sparsity,
            "value": metric and metric.value, "stderr": metric and metric.stderr, "seconds": round(seconds, 3)}


if __name__ == "__main__":
    main()
