"""The searches of benchmarks/search in simulated time: what a simulation counts, and that every method runs in it."""

import argparse
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raysearch.config import Action, TrialConfig
from raysearch.search.sampler import Sampler
from raysearch.search.space import load_space

FOLDER = Path(__file__).parents[2] / "benchmarks" / "search"
OPTIONS = argparse.Namespace(start_s=0.4, plain_start_s=7.0)


@pytest.fixture(scope="module")
def benchmark() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import simulate

        yield simulate


class Fixed:
    """Trials of two rounds, all equal, whose rounds are stored or not."""

    start_s, counts_every_round = 1.0, True
    actions = (Action(sparsity=0.5), Action(sparsity=0.75))

    def __init__(self, shares_rounds: bool) -> None:
        self.shares_rounds, self.heard = shares_rounds, []

    def ask(self) -> tuple[int, tuple[Action, ...]]:
        return 0, self.actions

    def observe(self, number: int, depth: int, key: str, state: Any, seconds: float) -> None:
        self.heard.append((depth, state.sparsity))

    def end(self, number: int, keys: list[str]) -> None:
        assert len(keys) == 2


@pytest.mark.parametrize(("shares_rounds", "times"), [(False, [5, 9, 14, 18]), (True, [5, 9, 10, 10, 11, 11])])
def test_a_trial_takes_its_start_and_the_rounds_that_are_not_stored(benchmark: Any, shares_rounds: bool,
                                                                     times: list[float]) -> None:
    def four_seconds(parent: Any, action: Action) -> tuple[Any, float]:
        return benchmark.State(action.sparsity, 1.0), 4.0

    search = Fixed(shares_rounds)
    found, num_trials, starting_s = benchmark.simulate(search, four_seconds, num_workers=1, budget_s=times[-1] + 0.5)
    assert [when for when, _ in found] == times
    assert search.heard == [(1, 0.5), (2, 0.75)] * (len(times) // 2)
    assert num_trials == starting_s == len(times) // 2 + 1  # the last one had begun


@pytest.mark.parametrize("num_workers", [1, 4, 8])
@pytest.mark.parametrize("by", ["chain", "length", "longest first"])
def test_the_papers_60_configurations_compute_at_most_60_percent_of_their_180_rounds(benchmark: Any, by: str,
                                                                                    num_workers: int) -> None:
    given = [TrialConfig(schedule="constant", rate=rate, l1_lambda=l1, finetune_epochs=epochs, num_rounds=length)
             for rate in (0.1, 0.3, 0.5) for l1 in (1e-5, 1e-3) for epochs in (0.5, 1.0) for length in (1, 2, 3, 4, 5)]
    if by != "chain":
        given.sort(key=lambda one: one.num_rounds, reverse=by == "longest first")
    computed = Counter()

    class Set(benchmark.Ours):
        def ask(self) -> tuple[int, tuple[Action, ...]]:
            return super().ask() if self.sampler.num_asked < len(given) else (len(given), (Action(sparsity=0.0),))

    def four_seconds(parent: Any, action: Action) -> tuple[Any, float]:
        if not action.sparsity:
            return parent, 1e9
        computed[parent, action] += 1
        return benchmark.State(action.sparsity, parent.value + action.l1_lambda + 1e-9 * action.finetune_tokens), 4.0

    table = benchmark.read_table(FOLDER / "tiny.parquet")
    search = Set(table, load_space("search_spaces.magnitude")[1], 0, 0.4, brain=partial(Sampler, given=given))
    found, _, _ = benchmark.simulate(search, four_seconds, num_workers, 1e6)
    assert (len(given), len(found), len(computed)) == (60, 180, 60)
    assert computed.total() <= 0.6 * 180


def test_hypervolume_is_of_what_was_found_until_then(benchmark: Any) -> None:
    table = benchmark.read_table(FOLDER / "tiny.parquet")
    table = table._replace(num_parameters=100, num_prunable=100)
    found = [(1.0, benchmark.State(0.5, 1.0)), (3.0, benchmark.State(0.75, 1.5))]
    curve = benchmark.hypervolumes(table, found, np.array([0.5, 1.0, 2.9, 3.0]))
    assert curve == pytest.approx([0.0, 0.5, 0.5, 0.625])


@pytest.mark.parametrize(("name", "share"), [("tiny", 0.6), ("books_30m", 0.15)])
def test_the_surrogate_is_closer_than_the_spread_of_what_was_recorded(benchmark: Any, name: str, share: float) -> None:
    table = benchmark.read_table(FOLDER / f"{name}.parquet")
    assert len(table.rounds) > 150
    assert all(len(chain) in (3, 4) for chain in table.chains[:20])
    errors = benchmark.held_out_errors(table, num_folds=2)
    assert 0 < errors["round"] < share * errors["spread"]
    assert errors["chain"] < errors["spread"]


def test_tables_of_one_space_are_joined_under_one_baseline(benchmark: Any, tmp_path: Path) -> None:
    import record

    tables = [pq.read_table(FOLDER / f"{name}.parquet") for name in ("tiny", "books_30m")]
    seeds = list(dict.fromkeys(tables[0]["seed"].to_pylist()))
    first, second = (tables[0].filter(pc.equal(tables[0]["seed"], seed)) for seed in seeds[:2])
    second = pa.concat_tables([first[:1].set_column(0, "seed", pa.array(seeds[1:2])), second])  # each scores the baseline
    record.write(tmp_path / "whole.parquet", [first, second])
    whole = pq.read_table(tmp_path / "whole.parquet")
    assert whole.num_rows == first.num_rows + second.num_rows - 1
    assert whole["parent"].null_count == 1
    assert benchmark.read_table(tmp_path / "whole.parquet").study == benchmark.read_table(FOLDER / "tiny.parquet").study
    for others in ([first, first], [first, tables[1]]):
        with pytest.raises(ValueError, match="must be of one space and its settings, each of other seeds, got [12] and"):
            record.write(tmp_path / "other.parquet", others)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.parquet"]


def test_every_method_runs_and_the_same_seed_gives_the_same(benchmark: Any) -> None:
    table, (_, space) = benchmark.read_table(FOLDER / "tiny.parquet"), load_space("search_spaces.demo")
    surrogate = benchmark.Surrogate(table.rounds)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    num_trials = {}
    for name, make in benchmark.methods(OPTIONS).items():
        runs = [benchmark.simulate(make(table, space, 3), surrogate, 2, 60.0) for _ in range(2)]
        assert runs[0] == runs[1], name
        found, num_trials[name], _ = runs[0]
        assert [when for when, _ in found] == sorted(when for when, _ in found)
        assert all(0 < state.sparsity < 1 for _, state in found)
    assert num_trials["plain"] < min(number for name, number in num_trials.items() if name not in ("plain", "ours, cold"))


def test_mo_asha_lets_a_third_go_on_spread_over_the_front(benchmark: Any) -> None:
    points = {0: (0.0, 1.0), 1: (0.5, 0.5), 2: (1.0, 0.0), 3: (0.1, 0.9), 4: (0.6, 0.6), 5: (2.0, 2.0)}
    assert benchmark.priority(points) == [0, 2, 1, 3, 4, 5]  # the front's ends, its middle, the other one; then what they beat
