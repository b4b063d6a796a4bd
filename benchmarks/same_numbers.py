"""Whether a change changed a number: the chains of chains.jsonl, replayed in process and compared bit for bit with a file.

    python benchmarks/same_numbers.py --record before.json     # at the commit before the change
    python benchmarks/same_numbers.py --compare before.json    # after it, on the same machine

Each chain is the settings of one trial. It runs round by round (`run_round`) in fp32 on the CPU with one thread a rank: on
one rank at ZeRO-0 and on two ranks at ZeRO-3. Compared are, for every round: the loss of every step on every rank, the
masks, the weights, the key, sizes and metrics. (Sweeps are no ruler: with several workers, timing decides what the sampler
proposes.) The model is a random GPT-2 of the tiny preset, or --model with --corpus. Prints one JSON line; exit code 1 when a
number differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from random_study import model_folder, write_corpus

from raysearch.config import TrialConfig, study_of
from raysearch.kernels.device import device_name
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import versions
from raysearch.training.finetune import Diverged
from raysearch.training.hardware import free_port
from raysearch.trial.actions import resolve_actions
from raysearch.trial.inputs import read_inputs, resolve
from raysearch.trial.round import dense_round, run_round
from raysearch.trial.worker import Worker

GANGS = {"1 rank, ZeRO-0": (1, 0), "2 ranks, ZeRO-3": (2, 3)}
CHAINS = Path(__file__).with_name("chains.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description="losses, masks, weights and metrics of fixed chains, bit for bit")
    parser.add_argument("--record", type=Path, help="write the numbers here")
    parser.add_argument("--compare", type=Path, help="compare with the numbers recorded here")
    parser.add_argument("--ignore", nargs="*", default=[], help="fields that may differ, such as key")
    parser.add_argument("--chains", type=Path, default=CHAINS)
    parser.add_argument("--model", default="tiny", help="tiny (random) or a Hugging Face folder")
    parser.add_argument("--corpus", help="text of a given model")
    parser.add_argument("--epoch-tokens", type=int, default=8192)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # this process is one rank: the job as JSON
    options = parser.parse_args()
    if options.rank_of:
        run_rank(json.loads(options.rank_of))
        return
    chains = [json.loads(line) for line in options.chains.read_text().splitlines()]
    with tempfile.TemporaryDirectory(prefix="raysearch-same-numbers-") as name:
        folder = Path(name)
        model = model_folder(options.model, folder / "model", torch.float32)
        corpus = options.corpus or write_corpus(folder / "corpus.txt", num_documents=300)
        job = {"model": str(model), "corpus": str(corpus), "epoch_tokens": options.epoch_tokens, "chains": chains,
               "folder": name}
        now = {gang: run_gang({**job, "num_ranks": ranks, "zero_stage": stage}) for gang, (ranks, stage) in GANGS.items()}
    if options.record:
        options.record.write_text(json.dumps(now, indent=1))
    before = json.loads(options.compare.read_text()) if options.compare else now
    differences = list(compared(before, now, set(options.ignore)))
    print(json.dumps({"benchmark": "same_numbers", "model": options.model, "num_chains": len(chains),
                      "num_numbers": {gang: sum(map(count, rounds)) for gang, rounds in now.items()},
                      "compared_with": str(options.compare) if options.compare else None, "ignored": options.ignore,
                      "num_differences": len(differences), "first_differences": differences[:10],
                      "date": date.today().isoformat(), "device": device_name("cpu"), **versions()}))
    sys.exit(bool(differences))


def run_gang(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rounds of all chains, as rank 0 wrote them, with every rank's losses."""
    shared = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
              "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(job["num_ranks"]), "LOCAL_RANK": "0",
              "RAYSEARCH_CACHE": str(Path(job["folder"]) / "cache")}
    ranks = [subprocess.Popen([sys.executable, __file__, "--rank-of", json.dumps(job)], env={**shared, "RANK": str(rank)})
             for rank in range(job["num_ranks"])]
    if any(process.wait() for process in ranks):
        sys.exit("a rank failed; its error is above")
    return json.loads((Path(job["folder"]) / "rounds.json").read_text())


def run_rank(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    context_tokens = 128
    study = resolve(study_of(path=job["model"], corpus=job["corpus"], context_tokens=context_tokens, dtype="float32",
                          batch_tokens=8 * context_tokens, epoch_tokens=job["epoch_tokens"], num_items=12,
                          tasks=("text", "choice"), weight_decay=0.01, num_ranks=job["num_ranks"],
                          zero_stage=job["zero_stage"]))
    inputs = read_inputs(study)
    worker = Worker(study, Ledger(Path(job["folder"]) / f"study-{job['num_ranks']}"), inputs)
    losses: list[str] = []
    train_step = worker.engine.train_step

    def noted(*arguments: Any, **named: Any) -> torch.Tensor:
        loss = train_step(*arguments, **named)
        losses.append(float(loss).hex())
        return loss

    worker.engine.train_step = noted
    rounds = [numbers(worker, dense_round(worker), 0, losses)]
    for chain, fields in enumerate(job["chains"]):
        candidate = dense_round(worker)
        for action in resolve_actions(TrialConfig(**fields), study, inputs.num_train_tokens):
            losses.clear()
            try:
                candidate = run_round(worker, candidate, action)
            except Diverged as error:
                rounds.append({"chain": chain, "depth": candidate.depth + 1, "diverged": str(error), "losses": list(losses)})
                break
            rounds.append(numbers(worker, candidate, chain, losses))
    if worker.engine.rank == 0:
        (Path(job["folder"]) / "rounds.json").write_text(json.dumps(rounds))


def numbers(worker: Any, record: Any, chain: int, losses: list[str]) -> dict[str, Any]:
    """What must stay equal of one round. Collective."""
    weights, masks = hashlib.sha256(), hashlib.sha256()
    prunable = {p.name for p in worker.engine.prunables}
    if worker.loaded_key == record.key:
        for name in worker.engine.shapes:
            whole = worker.engine.gather(name).cpu()
            weights.update(whole.numpy().tobytes())
            masks.update((whole != 0).numpy().tobytes() if name in prunable else b"")
    return {"chain": chain, "depth": record.depth, "key": record.key, "losses": worker.engine.gather_objects(list(losses)),
            "weights": weights.hexdigest(), "masks": masks.hexdigest(),
            "sizes": [record.num_nonzero, record.stored_bytes, record.resident_bytes, record.sparsity, record.model_sparsity],
            "train_loss": record.train_loss,
            "metrics": {name: [metric.value, metric.stderr, metric.num_items] for name, metric in record.metrics.items()}}


def count(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(count, value.values()))
    return sum(map(count, value)) if isinstance(value, list) else 1


def compared(before: dict[str, Any], now: dict[str, Any], ignored: set[str]) -> Any:
    """What differs, as "gang, chain, round: field"."""
    for gang in sorted({*before, *now}):
        old, new = before.get(gang, []), now.get(gang, [])
        if len(old) != len(new):
            yield f"{gang}: {len(old)} rounds before, {len(new)} now"
        for one, other in zip(old, new):
            where = f"{gang}, chain {one['chain']}, round {one['depth']}"
            yield from (f"{where}: {field}" for field in one
                       if field not in ignored and one[field] != other.get(field))


if __name__ == "__main__":
    main()
