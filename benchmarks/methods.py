"""Pruning methods against each other and against dense controls of equal tokens, books-30m, in one warm process.

    python benchmarks/methods.py run OUT [--root ../shared] [--part 0/1] [--groups one_shot,losses] [--limit-s 600]
    python benchmarks/methods.py table OUT [OUT ...] > docs/results/methods_table.md

`run` prunes and fine-tunes the cases below through the rounds that a study runs, and scores each candidate on the whole of
books/validation.txt and openstax/validation.txt (bits per byte; no document of either is in the training text) and of LAMBADA.
Of the cases, part I of N takes every N-th, so that several GPUs may share them; a case is begun only before `limit-s`. It adds
a JSON line a case to OUT/cases.jsonl and writes what each item scored beside it. `table` needs no GPU: means over data seeds
and standard errors of paired differences over items.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysearch.config import Action, TrialConfig, study_of
from raysearch.evaluation.item_task import ItemTask
from raysearch.evaluation.tasks import HELDOUT_CONFIGS, load_tasks
from raysearch.frozen import parse
from raysearch.kernels.device import device_name
from raysearch.study.items import Items, read_items, write_items
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import provenance
from raysearch.study.records import StudyRecord
from raysearch.trial.actions import resolve_actions
from raysearch.trial.inputs import read_inputs
from raysearch.trial.round import dense_round, run_round
from raysearch.trial.worker import Worker

STEP_TOKENS, EPOCH_STEPS = 65_536, 10
METRICS = ("books/bits_per_byte", "openstax/bits_per_byte", "lambada/acc", "lambada/perplexity")
LEARNING_RATE = 1e-3
SEEDS = (0, 1, 2)
Case = tuple[str, dict[str, Any], int]
"""Name, trial configuration, seed of the data."""


def trained(steps: int, **method: Any) -> dict[str, Any]:
    rounds = method.get("num_rounds", 1)
    return {"learning_rate": LEARNING_RATE, "finetune_epochs": steps / EPOCH_STEPS / rounds, **method}


def control(steps: int) -> dict[str, Any]:
    return trained(steps, target_sparsity=0.0)


def one_shot() -> Iterator[Case]:
    """No training."""
    per_layer = {"magnitude": "layer", "taylor": "layer", "wanda": "row", "ria": "row", "sparsegpt": "layer"}
    for criterion in per_layer:
        yield f"{criterion}, 2:4", {"criterion": criterion, "pattern": "2:4"}, 0
    for sparsity in (0.5, 0.7):
        yield f"magnitude, global, {sparsity}", {"target_sparsity": sparsity}, 0
        for criterion, scope in per_layer.items():
            method = {"criterion": criterion, "scope": scope, "target_sparsity": sparsity}
            yield f"{criterion}, {scope}, {sparsity}", method, 0
            yield f"{criterion}, {scope}, {sparsity}, OWL", {**method, "budget": "owl"}, 0


def losses() -> Iterator[Case]:
    """Cross-entropy against the divergence from the dense model, at equal tokens and, with 1.4 times the steps, at equal
    seconds; one-shot global magnitude."""
    for seed in SEEDS:
        for steps in (120, 168):
            yield f"dense control, {steps} steps", control(steps), seed
        for sparsity in (0.5, 0.75, 0.9):
            for name, steps, alpha in (("CE", 120, 0.0), ("KL", 120, 1.0), ("2/3 KL", 120, 2 / 3), ("CE", 168, 0.0)):
                yield (f"{name}, {sparsity}, {steps} steps",
                       trained(steps, target_sparsity=sparsity, distill_alpha=alpha), seed)


def methods() -> Iterator[Case]:
    """Against global magnitude, pruned at once, with the same tokens."""
    for seed in SEEDS:
        for sparsity in (0.5, 0.7, 0.9):
            for name, method in (
                    ("magnitude", {}),
                    ("magnitude, 4 rounds", {"schedule": "cubic", "num_rounds": 4}),
                    ("gradual magnitude", {"criterion": "gradual_magnitude"}),
                    ("sparsegpt", {"criterion": "sparsegpt", "scope": "layer"}),
                    ("wanda", {"criterion": "wanda", "scope": "row"}),
                    ("movement", {"criterion": "movement"}),
                    ("magnitude and 2/3 KL", {"distill_alpha": 2 / 3}),
                    ("SR-STE", {"criterion": "sr_ste"}),
                    ("RigL", {"criterion": "rigl"}),
                    ("SET", {"criterion": "set"})):
                yield f"{name}, {sparsity}, 120 steps", trained(120, target_sparsity=sparsity, **method), seed
        for name, method in (("magnitude", {}), ("gradual magnitude", {"criterion": "gradual_magnitude"}),
                             ("SR-STE", {"criterion": "sr_ste"}), ("sparsegpt", {"criterion": "sparsegpt"}),
                             ("wanda", {"criterion": "wanda"})):
            yield f"{name}, 2:4, 120 steps", trained(120, pattern="2:4", **method), seed


def n_of_m() -> Iterator[Case]:
    """2:4 after 1,000 steps, 66 M tokens."""
    for seed in SEEDS:
        yield "dense control, 1000 steps", control(1000), seed
        yield "gradual magnitude, 2:4, 1000 steps", trained(1000, pattern="2:4", criterion="gradual_magnitude"), seed
        yield ("SR-STE and 2/3 KL, 2:4, 1000 steps",
               trained(1000, pattern="2:4", criterion="sr_ste", distill_alpha=2 / 3), seed)
        yield ("sparsegpt and 2/3 KL, 2:4, 1000 steps",
               trained(1000, pattern="2:4", criterion="sparsegpt", distill_alpha=2 / 3), seed)


def equal_seconds() -> Iterator[Case]:
    """Global magnitude with the seconds of SparseGPT, which prunes as long as 120 steps more take."""
    for seed in SEEDS:
        yield "dense control, 240 steps", control(240), seed
        for sparsity in (0.5, 0.7, 0.9):
            yield f"magnitude, {sparsity}, 240 steps", trained(240, target_sparsity=sparsity), seed
        yield "magnitude, 2:4, 240 steps", trained(240, pattern="2:4"), seed


def arithmetic() -> Iterator[Case]:
    """To be run with --compile on and off: what a graph's other order of sums does to a long run."""
    yield "magnitude, 0.5, 300 steps", trained(300, target_sparsity=0.5), 0


GROUPS = {"one_shot": one_shot, "losses": losses, "methods": methods, "n_of_m": n_of_m, "equal_seconds": equal_seconds,
          "arithmetic": arithmetic}


def file_name(name: str, seed: int) -> str:
    return f"{name}, seed {seed}".replace(" ", "_").replace("/", "of") + ".npz"


def run(options: argparse.Namespace, all_groups: dict[str, Callable[[], Iterator[Case]]],
        look: Callable[[Worker, str, int], dict[str, Any]] = lambda worker, name, seed: {}) -> None:
    """`look` adds to a case's line what it finds in the worker, which holds the candidate."""
    torch.set_num_threads(min(4, torch.get_num_threads()))  # of several processes with all cores each, none gets on
    started, data = time.perf_counter(), options.root / "data"
    study = study_of(
        path=str(options.root / "models" / "books-30m"), dtype="bfloat16", corpus=str(data / "books" / "train.txt"),
        context_tokens=512, epoch_tokens=STEP_TOKENS * EPOCH_STEPS, batch_tokens=STEP_TOKENS, tasks=("lambada",),
        data_dir=str(data), objectives=("num_nonzero", METRICS[0]), gpus_per_rank=float(not options.cpu),
        compile={"auto": "auto", "on": True, "off": False}[options.compile])
    inputs = read_inputs(study, lambda line: print(line, file=sys.stderr))
    cut, config, _ = HELDOUT_CONFIGS["text"]
    tasks = load_tasks(["lambada"], data_dir=data)
    for name in ("books", "openstax"):
        documents = (data / name / "validation.txt").read_text().split("<|endoftext|>")
        items = cut([text for text in documents if text.strip()], limit=None, seed=0)
        tasks.append(ItemTask({"task": name, **config}, items, items[:1]))
    inputs = replace(inputs, tasks={"selection": tasks, "report": tasks})
    (options.out / "study").mkdir(parents=True)
    ledger = Ledger(options.out / "study")
    ledger.attach(StudyRecord(study=study, space="methods", space_hash="", root_key=inputs.root_key,
                              provenance=provenance(device_name("cpu"))))
    worker = Worker(study, ledger, inputs)
    part, num_parts = map(int, options.part.split("/"))
    seeds = set(map(int, options.seeds.split(",")))
    done = {(line["case"], line["seed"]) for file in options.skip for line in map(json.loads, file.read_text().splitlines())}
    cases = [("dense", {}, 0),
             *(case for group in options.groups.split(",") for case in all_groups[group]()
               if case[2] in seeds and (case[0], case[2]) not in done)]
    cases.sort(key=lambda case: case[2])  # where time runs out, the first seeds are whole
    for number, (name, config_fields, seed) in enumerate(cases):
        if (number and number % num_parts != part) or time.perf_counter() - started > options.limit_s:
            continue
        line: dict[str, Any] = {"case": name, "seed": seed, "device": device_name("cpu" if options.cpu else "cuda")}
        try:
            record, seconds = dense_round(worker), []
            for action in actions(config_fields, study, inputs, seed):
                record = run_round(worker, record, action)
                seconds.append((record.prune_s, record.finetune_s, record.evaluate_s))
            line |= {"sparsity": record.sparsity, "prune_s": sum(each[0] for each in seconds),
                     "finetune_s": sum(each[1] for each in seconds), "train_loss": record.train_loss,
                     **{metric: record.metrics[metric].value for metric in METRICS}}
            line |= look(worker, name, seed)
            stored = ledger.items(record.key, "selection")
            assert stored is not None
            write_items(options.out / file_name(name, seed), {metric: stored[metric] for metric in METRICS})
        except Exception as error:  # a benchmark of many methods reports the one that fails, and goes on
            line["error"] = f"{type(error).__name__}: {error}"[:300]
        with open(options.out / "cases.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": Path(sys.argv[0]).stem, "part": options.part,
                      "seconds": round(time.perf_counter() - started, 1)}))


def actions(fields: dict[str, Any], study: Any, inputs: Any, seed: int) -> list[Action]:
    if not fields:
        return []
    resolved = resolve_actions(parse(TrialConfig, fields, "case"), study, inputs.num_train_tokens)
    return [action.model_copy(update={"seed": seed}) if action.seed or action.finetune_tokens else action
            for action in resolved]


def paired(metric: str, ours: Items, theirs: Items) -> tuple[float, float]:
    """(difference, its standard error over items); for a perplexity of its logarithm."""
    difference, weight = ours.numerator - theirs.numerator, ours.weight
    ratio = difference.sum() / weight.sum()
    error = math.sqrt(len(weight) / (len(weight) - 1) * np.square(difference - ratio * weight).sum()) / weight.sum()
    unit = math.log(2) if metric.endswith("bits_per_byte") else 1.0
    return ratio / unit, error / unit


def table(options: argparse.Namespace) -> None:
    """Differences from the dense control of equal steps where there is one, else from the dense model."""
    rows: dict[str, list[dict[str, Any]]] = {}
    where: dict[tuple[str, int], Path] = {}
    for folder in options.out:
        for line in map(json.loads, (folder / "cases.jsonl").read_text().splitlines()):
            if (line["case"], line["seed"]) not in where:
                rows.setdefault(line["case"], []).append(line)
                where[line["case"], line["seed"]] = folder / file_name(line["case"], line["seed"])
    print("| case | seeds | sparsity | books, bits per byte | - reference | openstax | - reference | LAMBADA acc | - reference "
          "| LAMBADA ppl / reference | prune s | fine-tune s |\n" + "|---" * 12 + "|")
    for name, lines in rows.items():
        failed = [line["error"] for line in lines if "error" in line]
        if failed:
            print(f"| {name} | failed: {failed[0]} |" + " |" * 10)
            continue
        steps = name.rpartition(", ")[2] if name.endswith("steps") else None
        cells = []
        for metric in METRICS:
            pairs = []
            for line in lines:
                reference = where.get((f"dense control, {steps}", line["seed"]), where["dense", 0])
                pairs.append(paired(metric, read_items(where[name, line["seed"]])[metric], read_items(reference)[metric]))
            # items are shared by the seeds, so their errors do not shrink with more seeds; the seeds' own spread comes on top
            differences = [difference for difference, _ in pairs]
            spread = float(np.std(differences, ddof=1) / math.sqrt(len(pairs))) if len(pairs) > 1 else 0.0
            error = math.hypot(float(np.mean([error for _, error in pairs])), spread)
            value, difference = float(np.mean([line[metric] for line in lines])), float(np.mean(differences))
            if metric.endswith("perplexity"):
                cells.append(f"{math.exp(difference):.3f} ± {math.exp(difference) * error:.3f}")
            else:
                cells += [f"{value:.4f}", f"{difference:+.4f} ± {error:.4f}"]
        print(f"| {name} | {len(lines)} | {lines[0]['sparsity']:.3f} | " + " | ".join(cells)
              + "".join(f" | {np.mean([line[key] for line in lines]):.1f}" for key in ("prune_s", "finetune_s")) + " |")


def add_arguments(run_parser: argparse.ArgumentParser, groups: Iterable[str], limit_s: float) -> None:
    run_parser.add_argument("out", type=Path)
    run_parser.add_argument("--root", type=Path, default=Path("../shared"))
    run_parser.add_argument("--part", default="0/1")
    run_parser.add_argument("--groups", default=",".join(groups))
    run_parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    run_parser.add_argument("--skip", type=Path, nargs="*", default=[], help="cases.jsonl of earlier runs")
    run_parser.add_argument("--limit-s", type=float, default=limit_s)
    run_parser.add_argument("--cpu", action="store_true")
    run_parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_arguments(commands.add_parser("run"), GROUPS, 600.0)
    commands.add_parser("table").add_argument("out", type=Path, nargs="+")
    options = parser.parse_args()
    if options.command == "run":
        if options.cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        run(options, GROUPS)
    else:
        table(options)


if __name__ == "__main__":
    main()
