"""Sizes are counted without weights, and are those of the form that compaction leaves. That every stage and world size counts
alike is held by test_pruner.py, which has the ranks; every family, and the files, by end_to_end/test_families.py."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raysearch.models.compact import compact
from raysearch.trial.round import dense_round, load_candidate
from raysearch.trial.sizes import empty_lines, weighed
from raysearch.trial.worker import Worker

MLP, OUTPUT, QKV = "transformer.h.1.mlp", "transformer.h.0.attn.c_proj", "transformer.h.0.attn.c_attn"


def unread_neurons(weights: dict[str, Tensor]) -> None:
    weights[f"{MLP}.c_proj.weight"][10:90] = 0  # 80 of 128; 16 more stay, for the width of tensor cores


def constant_neurons(weights: dict[str, Tensor]) -> None:
    """Their biases live, and are folded into the next one."""
    weights[f"{MLP}.c_fc.weight"][:, 64:] = 0
    weights[f"{MLP}.c_fc.bias"][64:] = 0.3


def a_head_and_a_layer(weights: dict[str, Tensor]) -> None:
    weights[f"{OUTPUT}.weight"][:16] = 0
    for name in ("attn.c_proj", "mlp.c_proj"):
        weights[f"transformer.h.1.{name}.weight"].zero_()
        weights[f"transformer.h.1.{name}.bias"].zero_()


def a_layer_but_for_a_bias(weights: dict[str, Tensor]) -> None:
    a_head_and_a_layer(weights)
    weights["transformer.h.1.attn.c_proj.bias"][3] = 1.0


@pytest.mark.parametrize("spoil", [unread_neurons, constant_neurons, a_head_and_a_layer, a_layer_but_for_a_bias])
def test_sizes_are_those_of_the_compact_form(worker: Worker, spoil: Callable[[dict[str, Tensor]], None]) -> None:
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    weights = {name: worker.engine.gather(name).clone() for name in worker.engine.shapes}
    spoil(weights)
    worker.engine.load(weights)
    model = copy.deepcopy(worker.engine.model)
    assert compact(model).num_parameters > 0
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    found = weighed(worker.engine, "bfloat16")
    assert (found.compact_parameters, found.resident_bytes) == (num_parameters, 2 * num_parameters)
    assert found.stored_bytes <= found.resident_bytes


def test_nothing_is_cut_out_of_what_has_no_empty_line(worker: Worker) -> None:
    load_candidate(worker, dense_round(worker))
    assert empty_lines(worker.engine) == {}
    found = weighed(worker.engine, "float32")
    assert found[3:] == (4 * 35_744, 4 * 35_744, None, None)
    assert sum(map(torch.numel, worker.engine.parameters.values())) == 35_744
