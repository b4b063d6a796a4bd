"""Racing on recorded per-item results: items saved for dominated candidates, and wrong eliminations, over replays.

    python benchmarks/racing.py --model ../shared/models/books-30m --data-dir ../shared/data --task lambada --limit 600

Scores the model dense and cut by magnitude at each sparsity once, then races every pair in many random orders, each
time as if the second were finished and no larger. Prints one JSON line; exit code 1 after a wrong elimination.
"""

import argparse
import datetime
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from raysearch.evaluation import Race, Scorer, evaluate, load_tasks
from raysearch.evaluation.racing import is_dominated, item_order, looks
from raysearch.model import load_model, load_tokenizer, prunable_parameters


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/books-30m")
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--task", default="lambada")
    parser.add_argument("--metric", default="perplexity")
    parser.add_argument("--limit", type=int, default=600)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.5, 0.6])
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--level", type=float, default=0.001)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model, torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    tasks = load_tasks([options.task], data_dir=options.data_dir, split="selection", limit=options.limit)
    scorer = Scorer(model, load_tokenizer(options.model))
    prunable = {p.name for p in prunable_parameters(model, "matrices")}
    dense = {name: value.detach().clone() for name, value in model.named_parameters() if name in prunable}
    magnitudes = np.sort(torch.cat([value.abs().flatten() for value in dense.values()]).cpu().numpy())
    objective = f"{options.task}/{options.metric}"
    race = Race(objective, 0, lambda losses: False)
    recorded, values = [], []
    for sparsity in options.sparsities:
        cut = magnitudes[int(sparsity * (len(magnitudes) - 1))] if sparsity else 0.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in prunable:
                    parameter.copy_(dense[name] * (dense[name].abs() >= cut))
        evaluation = evaluate(scorer, tasks, race=race)
        recorded.append(np.array(evaluation.losses))
        values.append(round(evaluation.metrics[objective].value, 4))
    num_items = len(recorded[0])
    pairs, num_wrong, scored = [], 0, []
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
            else:
                scored += counts
                pairs.append({"candidate": options.sparsities[i], "rival": options.sparsities[j],
                              "mean_items": float(np.mean(counts))})
    print(json.dumps({
        "benchmark": "racing", "model": Path(options.model).name, "objective": objective, "num_items": num_items,
        "sparsities": options.sparsities, "values": values, "level": options.level, "replays": options.replays,
        "num_wrong": num_wrong, "mean_items_of_dominated": round(float(np.mean(scored)), 1),
        "times_fewer": round(num_items / float(np.mean(scored)), 2), "pairs": pairs,
        "torch": torch.__version__, "date": datetime.date.today().isoformat()}))
    return int(num_wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
