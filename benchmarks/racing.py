"""Racing on recorded per-item results: items saved for dominated candidates, and wrong eliminations, over replays.

    python benchmarks/racing.py --model ../shared/models/books-30m --data-dir ../shared/data --task lambada

Scores the model dense and cut by magnitude at each sparsity once, then races every pair in many random orders, each
time as if the second were finished and no larger. A candidate counts as dominated where all items show it: its paired
difference is above MIN_Z standard errors; closer pairs are listed, and must not be stopped wrongly. Prints one JSON line;
exit code 1 after a wrong elimination. --record keeps the losses, so that a second run replays only.
"""

import argparse
import datetime
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from raysearch.config import higher_is_better
from raysearch.evaluation import Race, Scorer, evaluate, load_tasks
from raysearch.evaluation.racing import is_dominated, item_losses, item_order, looks
from raysearch.models.model import load_model, load_tokenizer, prunable_parameters

MIN_Z = 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/books-30m")
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--task", default="lambada")
    parser.add_argument("--metric", default="perplexity")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.1, 0.3, 0.5, 0.6])
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--level", type=float, default=0.001)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", type=Path, default=None, help="file of losses, written after every model and read again")
    options = parser.parse_args()
    started_s = time.perf_counter()
    torch.set_num_threads(options.threads)
    objective = f"{options.task}/{options.metric}"
    known = json.loads(options.record.read_text()) if options.record is not None and options.record.is_file() else {}
    keys = [f"{options.model} {objective} {options.limit} {sparsity}" for sparsity in options.sparsities]
    if missing := [(key, sparsity) for key, sparsity in zip(keys, options.sparsities) if key not in known]:
        for key, value, losses in scored(options, objective, missing):
            known[key] = {"value": value, "losses": losses}
            if options.record is not None:
                options.record.write_text(json.dumps(known))
    values = [round(known[key]["value"], 4) for key in keys]
    recorded = [np.array(known[key]["losses"]) for key in keys]
    scored_s = time.perf_counter() - started_s
    num_items = len(recorded[0])
    pairs, num_wrong, counts_of_dominated = [], 0, []
    for i, losses in enumerate(recorded):
        for j, rival in enumerate(recorded):
            if i == j:
                continue
            counts = []
            for seed in range(options.replays):
                order = item_order(num_items, seed)
                counts.append(next((n for n in looks(num_items)
                                    if is_dominated(losses[order][:n], rival[order], options.level)), num_items))
            if losses.sum() <= rival.sum():
                num_wrong += sum(count < num_items for count in counts)
                continue
            difference = losses - rival
            z = difference.mean() / (difference.std(ddof=1) / num_items**0.5)
            if z > MIN_Z:
                counts_of_dominated += counts
            pairs.append({"candidate": options.sparsities[i], "rival": options.sparsities[j], "z": round(z, 1),
                          "mean_items": round(float(np.mean(counts)), 1)})
    mean_items = float(np.mean(counts_of_dominated)) if counts_of_dominated else None
    print(json.dumps({
        "benchmark": "racing", "model": Path(options.model).name, "objective": objective, "num_items": num_items,
        "sparsities": options.sparsities, "values": values, "level": options.level, "replays": options.replays,
        "num_wrong": num_wrong, "mean_items_of_dominated": mean_items,
        "times_fewer": mean_items and round(num_items / mean_items, 2), "pairs": pairs, "scored_s": round(scored_s, 1),
        "total_s": round(time.perf_counter() - started_s, 1), "threads": options.threads, "torch": torch.__version__,
        "date": datetime.date.today().isoformat()}))
    return int(num_wrong > 0)


def scored(options: argparse.Namespace, objective: str,
           wanted: list[tuple[str, float]]) -> Iterator[tuple[str, float, list[float]]]:
    """(key, value of the objective, losses in the order of the task) of each (key, sparsity)."""
    model = load_model(options.model, torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    tasks = load_tasks([options.task], data_dir=options.data_dir, split="selection", limit=options.limit)
    scorer = Scorer(model, load_tokenizer(options.model))
    prunable = {p.name for p in prunable_parameters(model, "matrices")}
    dense = {name: value.detach().clone() for name, value in model.named_parameters() if name in prunable}
    magnitudes = np.sort(torch.cat([value.abs().flatten() for value in dense.values()]).cpu().numpy())
    for key, sparsity in wanted:
        cut = magnitudes[int(sparsity * (len(magnitudes) - 1))] if sparsity else 0.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in prunable:
                    parameter.copy_(dense[name] * (dense[name].abs() >= cut))
        evaluation = evaluate(scorer, tasks, race=Race(objective, 0, lambda items: False))
        losses = item_losses(evaluation.items[objective], higher_is_better(objective))
        yield key, evaluation.metrics[objective].value, losses.tolist()


if __name__ == "__main__":
    raise SystemExit(main())
