"""What is compared within a matrix; a round with a calibrated criterion, stored, loaded and trained. That every stage and
world size makes the same masks is held by test_pruner.py, which has the ranks."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysearch.config import Action
from raysearch.models.model import Prunable
from raysearch.pruning.patterns import NOfM
from raysearch.study.records import round_key
from raysearch.trial.matrices import budget_of, layer_sparsities, matrix_mask
from raysearch.trial.pruner import Pruner
from raysearch.trial.round import dense_round, load_candidate, run_round
from raysearch.trial.worker import Worker


def test_what_is_compared_is_what_the_scope_says() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert matrix_mask(scores, "layer", None, 0.5).tolist() == [[False] * 4, [True] * 4]
    assert matrix_mask(scores, "row", None, 0.5).tolist() == [[False, False, True, True]] * 2
    assert matrix_mask(scores, "global", NOfM(1, 2), 0.5).tolist() == [[False, True, False, True]] * 2
    assert matrix_mask(torch.zeros(2, 4), "layer", None, 0.25).tolist() == [[False, False, True, True], [True] * 4]


def test_experts_share_a_budget() -> None:
    prunables = [Prunable("dense", (8, 8), False), Prunable("experts", (4, 8, 8), False), Prunable("large", (64, 64), True)]
    assert set(layer_sparsities(prunables, "uniform", 0.3).values()) == {0.3}
    found = layer_sparsities(prunables, "erdos_renyi", 0.6)
    assert found["dense"] == found["experts"] < 0.6 < found["large"]


@pytest.mark.parametrize("fields", [{"criterion": "wanda", "scope": "row"}, {"criterion": "sparsegpt", "pattern": "2:4"}])
def test_a_calibrated_round_is_stored_loaded_and_trained(worker: Worker, fields: dict) -> None:
    dense = dense_round(worker)
    one_shot = Action(sparsity=0.5, calibration_sequences=4, **fields)
    magnitude = Action(sparsity=0.5, **{name: value for name, value in fields.items() if name != "criterion"})
    found, by_magnitude = run_round(worker, dense, one_shot), run_round(worker, dense, magnitude)
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    key = "text/bits_per_byte"
    assert found.metrics[key].value < by_magnitude.metrics[key].value
    load_candidate(worker, dense)
    load_candidate(worker, found)
    kept = {p.name: worker.engine.gather(p.name) != 0 for p in worker.engine.prunables}
    trained = run_round(worker, found, Action(sparsity=0.5, calibration_sequences=4, finetune_tokens=1024, learning_rate=1e-3,
                                              **fields))
    for name, mask in kept.items():
        assert not (worker.engine.gather(name)[~mask]).any(), name
    assert trained.metrics[key].value < found.metrics[key].value
    assert round_key(dense.key, one_shot) == found.key


def test_owl_counts_outliers_among_each_blocks_wanda_scores(worker: Worker, tiny_model: Path) -> None:
    """By hand: hooks on the whole dense model, every score of a block in a loop."""
    load_candidate(worker, dense_round(worker))
    action = Action(budget="owl", owl_lambda=0.1, owl_m=2.5, scope="layer", sparsity=0.6, calibration_sequences=3)
    model, found = AutoModelForCausalLM.from_pretrained(tiny_model), []
    modules = {name: module for name, module in model.named_modules() if f"{name}.weight" in worker.engine.prunable_names}
    squares = {name: torch.zeros(module.weight.shape[0], dtype=torch.float64) for name, module in modules.items()}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda module, x, name=name: squares.update({
            name: squares[name] + x[0][0].double().square().sum(0)}))
    with torch.no_grad():
        for sequence in worker.inputs.blocks.stream(0, 3, 0):
            model(input_ids=sequence[None])
    for block in range(2):
        scores = [abs(w) * math.sqrt(total) for name, module in modules.items() if f".h.{block}." in name
                  for row, total in zip(module.weight.tolist(), squares[name].tolist()) for w in row]
        found.append(sum(each > 2.5 * sum(scores) / len(scores) for each in scores) / len(scores))
    shares = budget_of(worker.engine, action, worker.inputs.blocks)(0.6)
    wanted = {name: 0.6 + 0.1 * (1 if (found[0] < found[1]) == (".h.0." in name) else -1) for name in shares}
    assert shares == pytest.approx(wanted, abs=1e-9)
    record = run_round(worker, dense_round(worker), action)
    assert record.layer_sparsity == pytest.approx(shares, abs=1e-3)


def test_at_sparsity_0_the_weights_stay(worker: Worker, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for criterion in ("wanda", "ria", "sparsegpt"):
        action = Action(criterion=criterion, scope="layer", sparsity=0.0, calibration_sequences=2)
        load_candidate(worker, run_round(worker, dense_round(worker), action))
        for name, parameter in model.named_parameters():
            assert torch.equal(worker.engine.gather(name), parameter), (criterion, name)


@pytest.mark.parametrize("fields", [{"criterion": "wanda", "scope": "row"}, {"criterion": "sparsegpt", "pattern": "2:4"},
                                    {"scope": "row"}, {"pattern": "2:4"}])
def test_scores_that_are_no_numbers_are_refused(worker: Worker, fields: dict) -> None:
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    worker.engine.prunable_shards[-1].values[3] = math.nan
    with pytest.raises(ValueError, match="must be numbers, got NaN"):
        Pruner(worker.engine, Action(sparsity=0.5, calibration_sequences=4, **fields), 0, worker.inputs.blocks).begin()
