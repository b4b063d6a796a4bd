"""Rounds of a real space for the search benchmark, recorded: the demo's space on the tiny model, pruned and trained for real.

    python benchmarks/search/record.py benchmarks/search/tiny.parquet [--model DIR] [--limit-s 600] [--seed 0]

Random configurations run round by round in one warm process with one thread. After each comes a fork: one random round on a
random candidate of before, so that a surrogate of single rounds sees parents that no configuration leads to. A row is a
round; a diverged one has no size and no quality. A table that is there is made longer: give another seed. The model is
what `raysearch pretrain` makes of the tiny preset, and is trained first where there is none. Ends with one JSON line.
"""

import argparse
import json
import random
import tempfile
import time
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
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import versions
from raysearch.study.records import RoundRecord
from raysearch.training.finetune import Diverged
from raysearch.trial.actions import resolve_actions
from raysearch.trial.inputs import read_inputs, resolve
from raysearch.trial.round import dense_round, run_round
from raysearch.trial.worker import Worker

SPACE = "search_spaces.demo"
OBJECTIVE = "text/bits_per_byte"


def main() -> None:
    parser = argparse.ArgumentParser(description="record random rounds of the tiny model")
    parser.add_argument("table", type=Path)
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--limit-s", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.model.exists():
        from raysearch.training.pretrain import pretrain

        pretrain("tiny", "builtin", options.model, echo=print)
    study, space = load_space(SPACE)
    study = resolve(study.replaced(path=str(options.model.resolve()), tasks=("text",)), print)
    with tempfile.TemporaryDirectory(prefix="raysearch-record-") as folder:
        rows = pq.read_table(options.table).to_pylist() if options.table.exists() else []
        if options.seed in {row["seed"] for row in rows}:
            parser.error(f"--seed must be one that the table has not, got {options.seed}")
        rows += [{"seed": options.seed, **row}
                 for row in record(study, space, Path(folder), options.limit_s, options.seed)[bool(rows):]]
    schema = {"space": SPACE, "device": device_name("cpu"), "date": date.today().isoformat(), "study": study.model_dump_json()}
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(schema), options.table, compression="zstd")
    print(json.dumps({"benchmark": "search/record", **schema, "study": SPACE, "num_rounds": len(rows), **versions(),
                      "num_trials": len({(row["seed"], row["trial"]) for row in rows if row["trial"] is not None}),
                      "num_diverged": sum(row["num_nonzero"] is None for row in rows)}))


def record(study: Study, space: Any, folder: Path, limit_s: float, seed: int) -> list[dict[str, Any]]:
    """Rounds until the time is up, the dense baseline first."""
    inputs = read_inputs(study)
    worker, rng = Worker(study, Ledger(folder), inputs), random.Random(seed)
    dense = dense_round(worker)
    rows, candidates, began = [row(None, dense, dense.key, None, None, 0.0)], [dense], time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    asked = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))

    def step(trial: int | None, parent: RoundRecord, action: Action) -> RoundRecord | None:
        started = time.process_time()
        try:
            done = run_round(worker, parent, action)
        except Diverged:
            done = None
        rows.append(row(trial, done, None if done is None else done.key, parent.key, action, time.process_time() - started))
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
    return rows


def row(trial: int | None, done: RoundRecord | None, key: str | None, parent: str | None, action: Action | None,
        seconds: float) -> dict[str, Any]:
    metric = done and done.metrics[OBJECTIVE]
    return {"trial": trial, "key": key, "parent": parent,
            "action": action and action.model_dump_json(exclude_defaults=True),
            "num_nonzero": done and done.num_nonzero, "num_parameters": done and done.num_parameters,
            "num_prunable": done and done.num_prunable, "sparsity": done and done.sparsity,
            "value": metric and metric.value, "stderr": metric and metric.stderr, "seconds": round(seconds, 3)}


if __name__ == "__main__":
    main()
