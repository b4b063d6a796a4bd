"""What `min_gain_per_gpu_hour` saves and loses: simulated searches of a recorded space, cut where it would have ended them.

    python benchmarks/search/stopping.py [--table benchmarks/search/tiny.parquet] [--seeds 50] [--processes 1]

Four workers, each counted as a GPU, and a budget of 300 s. The cut is where the rule first holds, and what runs then is not
counted. Prints, for each least gain, quartiles over seeds of the budget that was used and of the hypervolume that is lost, over
that after the whole budget; and one JSON line.
"""

import argparse
import json
import warnings
from datetime import date
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from simulate import Ours, State, fitted, hypervolumes, quartiles, simulate

from raysearch.config import Action
from raysearch.kernels.device import device_name
from raysearch.search.space import load_space
from raysearch.study.provenance import versions
from raysearch.study.records import gives_little

LEAST = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WORKERS, BUDGET_S, START_S = 4, 300.0, 0.4


class Watched(Ours):
    """Ours, which notes how many rounds it had heard of when each trial was asked for."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.num_heard, self.heard_at_ask = 0, []

    def ask(self) -> tuple[int, tuple[Action, ...]]:
        self.heard_at_ask.append(self.num_heard)
        return super().ask()

    def observe(self, number: int, depth: int, key: str, state: State, seconds: float) -> None:
        self.num_heard += 1
        super().observe(number, depth, key, state, seconds)


def one_run(path: Path, seed: int) -> list[tuple[float, float]]:
    """(share of the budget, share of its hypervolume that is lost) for each of LEAST."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    table, surrogate = fitted(path)
    table = table._replace(study=table.study.replaced(gpus_per_rank=1.0))
    search = Watched(table, load_space(table.space)[1], seed, START_S)
    found, _, _ = simulate(search, surrogate, WORKERS, BUDGET_S)
    gains, results = search.sampler.gains, []
    for least in LEAST:
        cut = next((asked for asked in range(len(gains)) if gives_little(gains[:asked], least)), None)
        used_s = BUDGET_S if cut is None else found[search.heard_at_ask[cut] - 1][0]
        then, end = hypervolumes(table, found, np.array([used_s, BUDGET_S]))
        results.append((used_s / BUDGET_S, 1 - then / end))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="the stop rule in simulated time")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("tiny.parquet"))
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    with Pool(options.processes) as pool:
        runs = np.array(pool.map(partial(one_run, options.table), range(options.seeds), chunksize=1))  # (seeds, least, 2)
    rules = {least: {"budget_used": quartiles(runs[:, number, 0]), "hypervolume_lost": quartiles(runs[:, number, 1]),
                     "lost_at_worst": round(float(runs[:, number, 1].max()), 4)} for number, least in enumerate(LEAST)}
    for least, rule in rules.items():
        print(least, rule)
    print(json.dumps({"benchmark": "search/stopping", "table": options.table.name, "seeds": options.seeds, "workers": WORKERS,
                      "budget_s": BUDGET_S, "rules": rules, "date": date.today().isoformat(), "device": device_name("cpu"),
                      **versions()}))


if __name__ == "__main__":
    main()
