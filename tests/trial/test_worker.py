"""What one rank keeps between trials: races against the best candidate that is no larger."""

from pathlib import Path

import numpy as np
import pytest

from raysearch.config import SIZES, Action, Study
from raysearch.evaluation.racing import item_order
from raysearch.search.retention import frontier_keys
from raysearch.study.ledger import Ledger
from raysearch.trial.candidate import weigh
from raysearch.trial.inputs import read_inputs
from raysearch.trial.round import dense_round, run_round
from raysearch.trial.worker import Worker


def test_a_dominated_candidate_stops_being_scored_and_is_never_on_the_frontier(
        study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.evaluation.racing.FIRST_ITEMS", 2)
    racing = study.replaced(racing_level=0.01)
    inputs = read_inputs(racing)
    assert inputs.root_key != read_inputs(study).root_key
    worker = Worker(racing, Ledger(tmp_path), inputs)
    dense = dense_round(worker)
    small = run_round(worker, dense, Action(sparsity=0.9))
    asked: list[tuple[np.ndarray, np.ndarray, float]] = []
    monkeypatch.setattr("raysearch.trial.worker.is_dominated", lambda *args: (asked.append(args), True)[1])
    larger = run_round(worker, dense, Action(sparsity=0.5))
    assert (dense.dominated_by, small.dominated_by, larger.dominated_by) == (None, None, small.key)
    assert dense.metrics[racing.search.objective].num_items > 2
    assert larger.metrics[racing.search.objective].num_items == 2
    assert {name.partition("/")[0] for name in larger.metrics} == {"text"}
    (own, rival, level), = asked
    order = item_order(dense.metrics[racing.search.objective].num_items, racing.data.seed)
    whole, part = (worker.ledger.items(key, "selection") for key in (small.key, larger.key))
    assert set(part) == set(larger.metrics)
    assert part[racing.search.objective].item.tolist() == order[:2].tolist()
    assert own.tolist() == part[racing.search.objective].numerator.tolist()
    assert rival.tolist() == whole[racing.search.objective].numerator[order].tolist()
    assert level == 0.01
    assert larger.key not in frontier_keys(worker.ledger, racing)
    weighed = weigh(worker, None)
    assert all(getattr(weighed, size) == getattr(larger, size) for size in SIZES)  # any of them may be raced by


def test_a_rival_whose_items_are_gone_races_nobody(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.evaluation.racing.FIRST_ITEMS", 2)
    racing = study.replaced(**{"racing_level": 0.01})
    worker = Worker(racing, Ledger(tmp_path), read_inputs(racing))
    dense = dense_round(worker)
    assert worker.race(dense.num_nonzero)[1] == dense.key
    worker.ledger.items_path(dense.key, "selection").unlink()
    assert worker.race(dense.num_nonzero)[1] is None
    monkeypatch.setattr("raysearch.trial.worker.is_dominated", lambda *args: True)
    assert run_round(worker, dense, Action(sparsity=0.0)).dominated_by is None


def test_racing_changes_no_number_of_a_candidate_that_is_scored_in_full(worker: Worker, study: Study, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.evaluation.racing.FIRST_ITEMS", 2)
    racing = study.replaced(**{"racing_level": 0.01})
    raced = dense_round(Worker(racing, Ledger(tmp_path), read_inputs(racing))).metrics
    for name, metric in dense_round(worker).metrics.items():
        assert raced[name].num_items == metric.num_items
        assert raced[name].value == pytest.approx(metric.value, rel=1e-5)
