"""What bands and picks are worth, on simulated studies whose truth is known.

    python benchmarks/decisions.py --studies 400 --num-items 5000

A study: `--candidates` models of all sizes down to a tenth, each right on an item where its strength there, 97 % of whose
variance all share (so that one item in thirteen separates two of them), is enough; a model of size s loses
steepness * (1 - s)^3 and, by luck of its configuration, about 1 point more. All are scored on the selection split; those on its
frontier on the report split, as a sweep does. Prints one JSON line: how often a pick at 95 % breaks its limit, the same for one
that is chosen and published on the report split, how near in size picks are to the best that truly keeps the limit, what
the bands cover, and how often `compare` tells two equal models apart, and two that differ by 3 points.
"""

import argparse
import json
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from analysis.compare import compared
from analysis.constraints import Constraint, check_resampled, room_in_stderr
from analysis.uncertainty import Draws, band, fixed_sequence, frontier_band, hypervolume_interval, resample
from raysearch.pruning.pareto import hypervolume, pareto_front
from raysearch.study.items import Items

DENSE = 0.6
"""True accuracy of the dense model, which is candidate 0."""


def scored(random: np.random.Generator, truth: npt.NDArray[np.float64], num_items: int, shared: float = 0.97) -> list[Items]:
    cut = np.array([NormalDist().inv_cdf(p) for p in truth])
    strength = random.standard_normal((num_items, 1)) * shared**0.5
    right = strength + random.standard_normal((num_items, len(truth))) * (1 - shared) ** 0.5 < cut
    index = np.arange(num_items)
    return [Items(column, np.ones(num_items), index.astype(np.uint64), index) for column in right.T.astype(float)]


def study(random: np.random.Generator, num_candidates: int, num_items: int, num_report_items: int, steepness: float
          ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], Draws, Draws]:
    """(sizes, true accuracies, draws on selection and on report) of the dense model and the frontier of the selection split."""
    size = np.append(1.0, random.uniform(0.1, 1, num_candidates))
    loss = steepness * (1 - size) ** 3 + np.append(0.0, random.exponential(0.01, num_candidates))
    truth = DENSE - loss
    selection = scored(random, truth, num_items)
    front = pareto_front(size, [items.numerator.sum() for items in selection])
    front[0] = True
    size, truth = size[front], truth[front]
    report = scored(random, truth, num_report_items)
    return size, truth, resample("task/acc", [one for one, on in zip(selection, front) if on]), resample("task/acc", report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--candidates", type=int, default=120)
    parser.add_argument("--num-items", type=int, default=5000)
    parser.add_argument("--num-report-items", type=int, help="of the report split, if not as many")
    parser.add_argument("--steepness", type=float, default=0.3, help="accuracy lost at size 0")
    parser.add_argument("--limit", type=float, default=1.0, help="points")
    options = parser.parse_args()
    print(json.dumps(simulated(options.studies, options.candidates, options.num_items, options.steepness, options.limit,
                               options.first_seed, options.num_report_items)))


def told_apart(random: np.random.Generator, points: float, num_items: int) -> bool:
    """Whether `compare` says which of two models is better whose accuracies differ by so many points."""
    pair = compared(resample("task/acc", scored(random, np.array([DENSE, DENSE - points / 100]), num_items)))
    return pair["low"] > 0 or pair["high"] < 0


def simulated(studies: int, candidates: int, num_items: int, steepness: float, limit: float, first_seed: int = 0,
              num_report_items: int | None = None) -> dict[str, float]:
    constraint = Constraint(kind="max_drop", metric="task/acc", limit=limit, confidence=0.95)
    counts = dict.fromkeys(("picked", "broken", "near", "naive_broken", "candidates_covered", "frontier_covered",
                            "hypervolume_covered", "tie_told_apart", "3_points_told_apart"), 0)
    ratios, certifiable = [], 0
    for seed in range(first_seed, first_seed + studies):
        random = np.random.default_rng(seed)
        size, truth, selection, report = study(random, candidates, num_items, num_report_items or num_items, steepness)
        keeps = 100 * (DENSE - truth) <= limit
        best = size[keeps].min()  # the dense model does
        selected, reported = ([check_resampled(constraint, draws, 0, i) for i in range(1, len(size))]
                              for draws in (selection, report))
        passed, _ = fixed_sequence(size[1:], [room_in_stderr(check) for check in selected],
                                   [check.margin >= 0 for check in reported])
        picked = passed[-1] + 1 if passed else 0
        counts["picked"] += bool(passed)
        counts["broken"] += not keeps[picked]
        counts["near"] += keeps[picked] and size[picked] <= 1.1 * best
        ratios.append(size[picked] / best)
        certain = keeps & (100 * (DENSE - truth) + 2 * max(check.stderr or 0 for check in reported) <= limit)
        certain[0] = True
        certifiable += size[certain].min() <= 1.1 * best
        naive = [i for i, check in enumerate(reported, 1) if check.value <= limit]
        counts["naive_broken"] += bool(naive) and not keeps[min(naive, key=lambda i: size[i])]
        low, high = band(report)
        counts["candidates_covered"] += bool(((low <= truth) & (truth <= high)).all())
        low, high = frontier_band(size, report)
        true_front = np.array([truth[size <= one].max() for one in size])
        counts["frontier_covered"] += bool(((low <= true_front) & (true_front <= high)).all())
        low, high = hypervolume_interval(size, report.value / report.value[0], report.drawn / report.drawn[:, :1], (1.0, 0.0))
        volume = hypervolume(np.column_stack([size, truth / DENSE]), (False, True), (1.0, 0.0))  # relative to dense, as shown
        counts["hypervolume_covered"] += low <= volume <= high
        counts["tie_told_apart"] += told_apart(random, 0, num_items)
        counts["3_points_told_apart"] += told_apart(random, 3, num_items)
    return {"studies": studies, "num_items": num_items, "num_report_items": num_report_items or num_items,
            "steepness": steepness, "limit_points": limit,
            **{name: round(float(count) / studies, 4) for name, count in counts.items()},
            "size_over_best_median": round(float(np.median(ratios)), 4),
            "size_over_best_80th_percentile": round(float(np.quantile(ratios, 0.8)), 4),
            "one_within_a_tenth_has_2_stderr_of_room": round(float(certifiable) / studies, 4)}


if __name__ == "__main__":
    main()
