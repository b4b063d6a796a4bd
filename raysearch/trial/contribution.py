"""What blocks and units do on calibration text: how much a block changes what it gets, and how much a unit gives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.models.architectures import architecture
from raysearch.pruning.criteria import squares
from raysearch.pruning.patterns import Units, over_layer_norms
from raysearch.training.data import Blocks
from raysearch.training.engine import Engine
from raysearch.trial.matrices import shared_sequences

SCALE = 1 << 40
"""Cosines are summed as integers, in which no order of adding shows."""


@torch.no_grad()
def contributions(engine: Engine, action: Action, text: Blocks | None) -> Tensor:
    """fp64 [L] on the CPU: minus the mean cosine of a block's input and output over tokens, Sajjad et al. 2020
    (arXiv 2004.03844) section 3.5; differs in that all tokens count, where they look at the first alone. Collective, and equal
    on every rank; one sequence after the other."""
    known = architecture(engine.model)
    assert known is not None, "pattern layer was checked"
    blocks: Any = engine.model.get_submodule(known.blocks)
    sums = torch.zeros(len(blocks), dtype=torch.int64, device=engine.device)

    def add(index: int, inputs: Any, output: Any) -> None:
        after = output if torch.is_tensor(output) else output[0]
        cosines = torch.nn.functional.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
        sums[index] += (cosines * SCALE).round().long().sum() // cosines.numel()

    _run(engine, action, text, lambda: [
        block.register_forward_hook(lambda _, inputs, output, index=index: add(index, inputs, output))
        for index, block in enumerate(blocks)])
    return -engine.sum_over_ranks(sums).cpu().double() / SCALE / action.calibration_sequences


@torch.no_grad()
def activations(engine: Engine, action: Action, text: Blocks | None, units: Units) -> Tensor:
    """fp64 [U] on the CPU: the mean square, over tokens, of what a head or neuron gives to the matrix that reads it, over the
    norm of its layer's, Molchanov et al. 2016 (arXiv 1611.06440) section 2.2, "activation"; differs in that squares are
    averaged, for outputs of either sign. Collective, and equal on every rank; one sequence after the other."""
    none = len(units.group)
    sums, num_read = torch.zeros(2, none + 1, dtype=torch.float64, device=engine.device)
    readers: list[tuple[Any, Tensor]] = []
    for part in units.parts:
        if part.reads:
            unit = part.rows if part.lies_in_rows else part.columns
            unit = torch.where(unit < 0, none, unit).to(engine.device)
            readers.append((engine.model.get_submodule(part.name.removesuffix(".weight")), unit))
            num_read.index_add_(0, unit, torch.ones_like(unit, dtype=torch.float64))

    def add(inputs: Any, unit: Tensor) -> None:
        positions = inputs[0].flatten(0, -2)
        sums.index_add_(0, unit, squares(positions) / len(positions))

    _run(engine, action, text, lambda: [module.register_forward_pre_hook(lambda _, inputs, unit=unit: add(inputs, unit))
                                        for module, unit in readers])
    scores = (engine.sum_over_ranks(sums) / num_read.clamp(min=1))[:-1].cpu() / action.calibration_sequences
    return over_layer_norms(scores, units)


def _run(engine: Engine, action: Action, text: Blocks | None, listen: Callable[[], list[Any]]) -> None:
    """The model over this rank's share of the sequences, with what `listen` hooks up while one counts."""
    engine.model.eval()
    for sequence, is_counted in zip(*shared_sequences(engine, action, text)):
        hooks = listen() if is_counted else []
        engine.model.base_model(input_ids=sequence[None], use_cache=False)
        for hook in hooks:
            hook.remove()
