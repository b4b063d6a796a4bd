"""By how much each block changes what it gets, on calibration text: what is nearly handed on contributes least."""

from typing import Any

import torch
from torch import Tensor

from raysearch.config import Action
from raysearch.models.architectures import architecture
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

    engine.model.eval()
    for sequence, is_counted in zip(*shared_sequences(engine, action, text)):
        hooks = [block.register_forward_hook(lambda _, inputs, output, index=index: add(index, inputs, output))
                 for index, block in enumerate(blocks) if is_counted]
        engine.model.base_model(input_ids=sequence[None], use_cache=False)
        for hook in hooks:
            hook.remove()
    return -engine.sum_over_ranks(sums).cpu().double() / SCALE / action.calibration_sequences
