"""Searches against each other in simulated time, on a surrogate of the recorded rounds. No GPU, no Ray; seconds a method.

    python benchmarks/search/simulate.py [--table benchmarks/search/tiny.parquet] [--seeds 50] [--workers 4]
        [--budget-s 300] [--start-s 0.4] [--plain-start-s 7] [--methods ours,plain] [--processes 1] [--curves FILE.json]

Workers are asynchronous: each asks for a trial, starts it, and runs its rounds; the search hears of each when it ends. `plain`
is Ray Tune with OptunaSearch as users have it: Optuna's TPE, told the last round of each trial, which alone is a candidate,
and processes that are new for each trial (`plain-start-s`). Hypervolume: of fraction of the dense parameters and of the dense
loss, from the reference (1, 2). Prints a table and one JSON line.
"""

import argparse
import heapq
import json
import time
import warnings
from collections.abc import Callable
from datetime import date
from functools import cache
from multiprocessing import Pool
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from surrogate import DENSE, State, Surrogate, Table, held_out_errors, read_table

from raysearch.config import Action, Metric
from raysearch.kernels.device import device_name
from raysearch.pruning.pareto import hypervolume, non_dominated
from raysearch.search.sampler import Sampler
from raysearch.search.space import Space, draw, load_space
from raysearch.study.provenance import provenance, versions
from raysearch.study.records import RoundRecord, TrialRecord, round_key
from raysearch.trial.actions import resolve_actions

DIRECTIONS = ["minimize", "minimize"]
REFERENCE = (1.0, 2.0)
"""The dense size, and twice the dense loss."""


class Search(Protocol):
    start_s: float
    counts_every_round: bool
    shares_rounds: bool

    def ask(self) -> tuple[int, tuple[Action, ...]]: ...
    def observe(self, number: int, depth: int, key: str, state: State, seconds: float) -> bool | None:
        """True where the trial is to be stopped."""
    def end(self, number: int, keys: list[str]) -> None: ...


class Ours:
    """The brain that `raysearch sweep` drives, with any sampler of Optuna's."""

    counts_every_round = shares_rounds = True

    def __init__(self, table: Table, space: Space, seed: int, start_s: float, sampler: BaseSampler | None = None,
                 brain: type[Sampler] = Sampler) -> None:
        self.table, self.start_s, self.asked = table, start_s, {}
        study = table.study.replaced(sampler_seed=seed)
        self.sampler = brain(optuna.create_study(directions=DIRECTIONS), study, space, sampler=sampler,
                             num_train_tokens=study.data.epoch_tokens or 0)
        self.sampler.observe(None, self._record(0, "", DENSE))

    def ask(self) -> tuple[int, tuple[Action, ...]]:
        asked = self.sampler.ask()
        assert asked is not None
        self.asked[asked.number] = asked
        return asked.number, asked.actions

    def observe(self, number: int, depth: int, key: str, state: State, seconds: float) -> None:
        self.sampler.observe(number, self._record(depth, key, state, seconds))

    def end(self, number: int, keys: list[str]) -> None:
        asked = self.asked[number]
        self.sampler.end(TrialRecord(number=number, config=asked.config, actions=asked.actions, keys=tuple(keys), status="done",
                                     forked_at=asked.forked_at, started_at=""))

    def _record(self, depth: int, key: str, state: State, seconds: float = 0.0) -> RoundRecord:
        table = self.table
        num_nonzero = table.num_parameters - round(state.sparsity * table.num_prunable)
        return RoundRecord(
            key=key, parent=None, action=None, depth=depth, num_parameters=table.num_parameters,
            num_prunable=table.num_prunable, num_nonzero=num_nonzero, sparsity=state.sparsity,
            model_sparsity=1 - num_nonzero / table.num_parameters, layer_sparsity={}, stored_bytes=0, resident_bytes=0,
            train_loss=None, prune_s=0, finetune_s=seconds, evaluate_s=0,
            metrics={table.study.search.objective: Metric(value=state.value * table.dense_value, stderr=0.0, num_items=1)},
            weights_sha256=None, provenance=PROVENANCE)


class Unlearned(Ours):
    """Ours, with any fork of the pool."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        assert self.sampler.forks is not None
        self.sampler.forks.promise = lambda means, deviations: np.zeros(len(means))


class LastRoundsOnly(Sampler):
    """Ours without the harvest: neither the sampler of whole trials nor forks hear of a round that is not the last."""

    def observe(self, number: int | None, candidate: RoundRecord) -> None:
        if number is None or candidate.depth == len(self._asked[number].actions):
            super().observe(number, candidate)


class Unaware(Ours):
    """Ours, whose forks do not count what is running as come out."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        assert self.sampler.forks is not None
        self.sampler.forks._expected = Forgetful()


class Forgetful(dict[int, Any]):
    def __setitem__(self, number: int, losses: Any) -> None:
        pass


class Plain:
    counts_every_round = shares_rounds = False

    def __init__(self, table: Table, space: Space, seed: int, start_s: float) -> None:
        self.table, self.space, self.start_s = table, space, start_s
        self.study = optuna.create_study(directions=DIRECTIONS, sampler=TPESampler(seed=seed))
        self.last: dict[int, tuple[float, float]] = {}

    def ask(self) -> tuple[int, tuple[Action, ...]]:
        trial = self.study.ask()
        study = self.table.study
        return trial.number, resolve_actions(draw(self.space, trial), study, study.data.epoch_tokens or 0)

    def observe(self, number: int, depth: int, key: str, state: State, seconds: float) -> bool | None:
        self.last[number] = (-state.sparsity, state.value)

    def end(self, number: int, keys: list[str]) -> None:
        self.study.tell(number, self.last[number])


class MoAsha(Plain):
    """MO-ASHA (Schmucker et al. 2021, arXiv 2106.12639) as Syne Tune has it: random configurations; at each rung (after 1, 3,
    9 rounds, eta = 3) a trial goes on if it is among the first third of those that came there, by non-dominated sorting and,
    within a front, its epsilon-net. Here every round is a candidate, gangs are warm and equal rounds are shared, as in ours."""

    counts_every_round = shares_rounds = True
    rungs, eta = (1, 3, 9), 3

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.study.sampler = RandomSampler(seed=arguments[2])
        self.reached: dict[int, dict[int, tuple[float, float]]] = {rung: {} for rung in self.rungs}

    def observe(self, number: int, depth: int, key: str, state: State, seconds: float) -> bool | None:
        super().observe(number, depth, key, state, seconds)
        if depth not in self.reached:
            return False
        rung = self.reached[depth]
        rung[number] = self.last[number]
        return number not in priority(rung)[:max(1, len(rung) // self.eta)] if len(rung) >= self.eta else False


def priority(points: dict[int, tuple[float, float]]) -> list[int]:
    """The most wanted first: front by front, each in the order of an epsilon-net (greedy farthest point, first objective's
    best first)."""
    numbers, values = list(points), np.array(list(points.values()))
    scaled = (values - values.min(axis=0)) / np.maximum(np.ptp(values, axis=0), 1e-12)
    behind, order = np.flatnonzero(np.isfinite(values).all(axis=1)), []
    while len(behind):
        front = non_dominated(values[behind], (False, False))
        left, behind = list(behind[front]), behind[~front]
        net = [min(left, key=lambda index: scaled[index, 0])]
        left.remove(net[0])
        while left:
            net.append(max(left, key=lambda index: min(np.linalg.norm(scaled[index] - scaled[other]) for other in net)))
            left.remove(net[-1])
        order += net
    return [numbers[index] for index in order]


PROVENANCE = provenance("simulated")


def methods(options: argparse.Namespace) -> dict[str, Callable[[Table, Space, int], Search]]:
    warm, cold = options.start_s, options.plain_start_s

    def whole(table: Table) -> Table:
        return table._replace(study=table.study.replaced(sampler="tpe"))

    return {
        "plain": lambda table, space, seed: Plain(table, space, seed, cold),
        "plain, warm": lambda table, space, seed: Plain(table, space, seed, warm),
        "ours": lambda table, space, seed: Ours(table, space, seed, warm),
        "ours, cold": lambda table, space, seed: Ours(table, space, seed, cold),
        "ours, forks not learned": lambda table, space, seed: Unlearned(table, space, seed, warm),
        "ours, running forks not counted": lambda table, space, seed: Unaware(table, space, seed, warm),
        "ours, last rounds only": lambda table, space, seed: Ours(table, space, seed, warm, brain=LastRoundsOnly),
        "ours, no forks": lambda table, space, seed: Ours(whole(table), space, seed, warm),
        "ours, no forks, last rounds only": lambda table, space, seed: Ours(whole(table), space, seed, warm,
                                                                            brain=LastRoundsOnly),
        "random": lambda table, space, seed: Ours(whole(table), space, seed, warm, RandomSampler(seed=seed)),
        "NSGA-II": lambda table, space, seed: Ours(whole(table), space, seed, warm,
                                                   NSGAIISampler(seed=seed, population_size=16)),
        "MO-ASHA": lambda table, space, seed: MoAsha(table, space, seed, warm),
    }


def simulate(search: Search, surrogate: Surrogate, num_workers: int, budget_s: float
             ) -> tuple[list[tuple[float, State]], int, float]:
    """((time, candidate) in order, trials begun, seconds that workers spent on starting)."""
    found: list[tuple[float, State]] = []
    stored: dict[str, tuple[State, float]] = {}
    events: list[tuple[float, int, int, tuple[Action, ...], list[str], State, float]] = []
    num_trials, starting_s, order = 0, 0.0, 0

    def push(now: float, number: int, actions: tuple[Action, ...], keys: list[str], state: State) -> None:
        """The next round of the trial, which ends after its seconds; one that is stored takes none."""
        nonlocal order
        key = round_key(keys[-1] if keys else "", actions[len(keys)])
        if search.shares_rounds and key in stored:
            (after, seconds), spent = stored[key], 0.0
        else:
            after, seconds = surrogate(state, actions[len(keys)])
            spent = seconds
        order += 1
        heapq.heappush(events, (now + spent, order, number, actions, [*keys, key], after, seconds))

    def begin(now: float) -> None:
        nonlocal num_trials, starting_s
        number, actions = search.ask()
        num_trials, starting_s = num_trials + 1, starting_s + search.start_s
        push(now + search.start_s, number, actions, [], DENSE)

    for _ in range(num_workers):
        begin(0.0)
    while events:
        now, _, number, actions, keys, state, seconds = heapq.heappop(events)
        if now > budget_s:
            break
        stored[keys[-1]] = state, seconds
        is_last = len(keys) == len(actions)
        if is_last or search.counts_every_round:
            found.append((now, state))
        is_last |= bool(search.observe(number, len(keys), keys[-1], state, seconds))
        if is_last:
            search.end(number, keys)
            begin(now)
        else:
            push(now, number, actions, keys, state)
    return found, num_trials, starting_s


def hypervolumes(table: Table, found: list[tuple[float, State]], times: np.ndarray) -> np.ndarray:
    """At each time, from what was found until then: (times,)."""
    points = np.array([(1 - state.sparsity * table.num_prunable / table.num_parameters, state.value) for _, state in found])
    ends = np.searchsorted([when for when, _ in found], times, side="right")
    return np.array([hypervolume(points[:end], (False, False), REFERENCE) for end in ends])


def quartiles(values: np.ndarray, method: Any = "linear") -> list[float]:
    return [round(float(each), 4) for each in np.quantile(values, (0.25, 0.5, 0.75), method=method)]


def first_time(curve: np.ndarray, times: np.ndarray, goal: float) -> float:
    """inf where it is never reached."""
    reached = curve >= goal
    return round(float(times[reached.argmax()]), 1) if reached.any() else float("inf")


@cache
def fitted(path: Path) -> tuple[Table, Surrogate]:
    table = read_table(path)
    return table, Surrogate(table.rounds)


def one_run(options: argparse.Namespace, name: str, seed: int) -> tuple[np.ndarray, int, float, float]:
    """(hypervolumes, trials begun, seconds of starting, seconds of processor) of a method's search."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    began, (table, surrogate) = time.process_time(), fitted(options.table)
    search = methods(options)[name](table, load_space(table.space)[1], seed)
    found, num_trials, starting_s = simulate(search, surrogate, options.workers, options.budget_s)
    return hypervolumes(table, found, grid(options)), num_trials, starting_s, time.process_time() - began


def grid(options: argparse.Namespace) -> np.ndarray:
    return np.linspace(0, options.budget_s, 301)[1:]


def summary(options: argparse.Namespace, runs: list[tuple[np.ndarray, int, float, float]], goal: float) -> dict[str, Any]:
    """`goal`: plain's final hypervolume."""
    times, curves = grid(options), np.array([run[0] for run in runs])
    median = np.median(curves, axis=0)
    return {
        **{f"hypervolume_{part}": quartiles(curves[:, len(times) // fraction - 1])
           for part, fraction in (("quarter", 4), ("half", 2), ("end", 1))},
        **{f"s_to_{share:.0%}": first_time(median, times, share * goal) for share in (0.95, 1.0)},
        "s_to_100%_by_seed": quartiles(np.array([first_time(curve, times, goal) for curve in curves]), "inverted_cdf"),
        "num_trials": float(np.median([run[1] for run in runs])),
        "starting_share": round(float(np.mean([run[2] for run in runs])) / options.workers / options.budget_s, 3),
        "cpu_s": round(sum(run[3] for run in runs), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="searches in simulated time")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("tiny.parquet"))
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--budget-s", type=float, default=300.0)
    parser.add_argument("--start-s", type=float, default=0.4)
    parser.add_argument("--plain-start-s", type=float, default=7.0)
    parser.add_argument("--methods", help="names with ; between; all by default")
    parser.add_argument("--goal", type=float, help="hypervolume, instead of plain's last, which is then not searched for")
    parser.add_argument("--processes", type=int, default=1, help="of this machine, for seeds at the same time")
    parser.add_argument("--curves", type=Path, help="file for the quartiles of each method's hypervolume over time")
    options = parser.parse_args()
    wanted = options.methods and ["plain"] * (options.goal is None) + options.methods.split(";")
    goal = options.goal
    names = [name for name in methods(options) if wanted is None or name in wanted]
    results, curves = {}, {}
    with Pool(options.processes) as pool:
        jobs = {name: pool.starmap_async(one_run, [(options, name, seed) for seed in range(options.seeds)], chunksize=1)
                for name in names}
        for name, job in jobs.items():
            runs = job.get()
            if goal is None:  # plain is the first
                goal = float(np.median([run[0][-1] for run in runs]))
            results[name] = summary(options, runs, goal)
            curves[name] = np.quantile([run[0] for run in runs], (0.25, 0.5, 0.75), axis=0).round(5).tolist()
            print(f"{name:33} {results[name]}", flush=True)
    if options.curves is not None:
        options.curves.write_text(json.dumps({"times": grid(options).tolist(), "curves": curves}))
    table, _ = fitted(options.table)
    print(json.dumps({"benchmark": "search/simulate", "table": options.table.name, "num_rounds": len(table.rounds),
                      "num_trials": len(table.chains), "held_out_rms": held_out_errors(table), "seeds": options.seeds,
                      "workers": options.workers, "budget_s": options.budget_s, "start_s": options.start_s,
                      "plain_start_s": options.plain_start_s, "methods": results, "date": date.today().isoformat(),
                      "device": device_name("cpu"), **versions()}))


if __name__ == "__main__":
    main()
