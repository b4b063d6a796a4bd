"""Times are measured once for a study, and what a candidate's is follows from them and its masks alone."""

from pathlib import Path

import pytest
import torch
from synthetic_study import PROVENANCE

from raysearch.config import Action, ServingSettings, Study
from raysearch.kernels.weight import random_mask
from raysearch.models.compact import CompactSize
from raysearch.study.ledger import Ledger
from raysearch.study.records import Latency
from raysearch.trial import worker as worker_module
from raysearch.trial.latency import BLOCKS, Weights, measured_latency, predicted_ms
from raysearch.trial.round import dense_round, run_round
from raysearch.trial.worker import Worker

SERVING = ServingSettings(batch_sequences=2, prompt_tokens=32, new_tokens=4)
TABLE = Latency(serving=SERVING, dense_ms=10.0, neurons=((0.5, 0.8), (1.0, 1.0)), heads=((0.25, 0.7), (1.0, 1.0)), layer=0.1,
                masked={"unstructured": ((0.1, 0.5), (0.7, 1.0)), "2:4": ((0.5, 0.75), (0.7, 1.0))}, provenance=PROVENANCE)


def left(num_layers: int, neurons: list[float], heads: list[float]) -> CompactSize:
    return CompactSize(0, 0, num_layers, 2, neurons, heads, {})


@pytest.mark.parametrize(("stays", "layers", "pattern", "milliseconds"), [
    (None, [Weights(10, 1.0)], "", 10.0),
    (left(2, [1.0, 0.5], [1.0, 1.0]), [], "neuron", 9.0),  # half of one of two MLPs: half of what both save
    (left(2, [1.0, 0.75], [0.25, 0.25]), [], "hybrid", 10 * (1 - 0.05 - 0.3)),
    (left(1, [1.0], [1.0]), [], "layer", 10 * (1 - (0.2 + 0.3) / 2 - 0.1)),  # its neurons, its heads and the rest of it
    (None, [Weights(10, 0.1)], "unstructured", 5.0),
    (None, [Weights(10, 0.1), Weights(30, 0.9)], "unstructured", 10 * (0.5 + 3) / 4),  # by weights; few zeros gain nothing
    (None, [Weights(10, 0.4)], "4:8", 7.5),  # no kernel's pattern is served like single weights
    (None, [Weights(10, 0.5)], "2:4", 7.5),
    (left(1, [1.0], [1.0]), [Weights(10, 0.1)], "unstructured", 10 * 0.65 * 0.5),
])
def test_a_time_lies_between_those_of_the_table(stays: CompactSize | None, layers: list[Weights], pattern: str,
                                                milliseconds: float) -> None:
    assert predicted_ms(TABLE, stays, layers, pattern) == pytest.approx(milliseconds)


def test_masks_that_are_timed_have_their_pattern_and_density() -> None:
    chance = torch.Generator().manual_seed(0)
    for pattern, side in BLOCKS.items():
        mask = random_mask((200, 136), pattern, side, 0.5, chance)
        assert mask.shape == (200, 136)
        assert float(mask.float().mean()) == pytest.approx(0.5, abs=0.15 if side > 1 else 0.02)
        if pattern == "2:4":
            assert mask.view(200, 34, 4).sum(-1).eq(2).all()
        assert (mask[:side, :side] == mask[0, 0]).all() or side == 1


def test_a_table_is_of_the_model_that_is_served(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # two threads on a busy machine wait for each other
    num_threads = torch.get_num_threads()
    table = measured_latency(str(tiny_model), torch.float32, SERVING)
    assert torch.get_num_threads() == num_threads
    assert table.dense_ms > 0
    assert [share for share, _ in table.neurons] == [0.5, 1.0]  # of 128, and no fewer than 64, for tensor cores
    assert [share for share, _ in table.heads] == [0.5, 1.0]  # of 2
    assert set(table.masked) == set(BLOCKS)
    for curve in (table.neurons, table.heads, *table.masked.values()):
        assert curve[-1][1] == 1.0
        assert list(curve) == sorted(curve)


def test_a_study_that_asks_measures_once_and_every_candidate_has_its_time(apart: Worker, study: Study,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    assert dense_round(apart).predicted_ms is None  # nothing asks
    monkeypatch.setattr(apart, "study", study.replaced(objectives=("predicted_ms", "text/bits_per_byte")))
    apart.ledger = Ledger(Path(str(apart.ledger.directory)) / "other")
    asked = []
    monkeypatch.setattr(worker_module, "measured_latency", lambda *given: asked.append(given) or TABLE)
    dense = dense_round(apart)
    assert dense.predicted_ms == 10.0
    path, copy = apart.ledger.twins("latency.json")
    path.write_text("torn")
    layer = run_round(apart, dense, Action(pattern="layer", sparsity=0.5, criterion="top"))
    assert layer.predicted_ms == pytest.approx(10 * (1 - (0.2 + 0.3) / 2 - 0.1))
    single = run_round(apart, layer, Action(sparsity=0.9))
    assert single.predicted_ms < layer.predicted_ms
    assert [given[1:] for given in asked] == [(torch.float32, study.serving)]  # once: its copy was read
