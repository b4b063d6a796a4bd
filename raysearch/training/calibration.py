"""Calibration: what flows into each linear layer, block after block, each behind the blocks as they are by then.

So the statistics of a block are those of a model whose earlier blocks are pruned, as in the public code of SparseGPT and Wanda.
A sequence goes through each block twice, and its hidden states are all that is kept of it.

Legend: n sequences of T tokens on this rank, K inputs of a linear layer.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raysearch.models.architectures import architecture, family

Statistic = Callable[[Tensor], Tensor]
"""inputs [positions, K] -> what is added up of them."""

Call = tuple[Any, Any]
"""(inputs, named inputs) of a block."""


def linears_of_blocks(model: nn.Module, names: Sequence[str]) -> tuple[Any, list[dict[str, nn.Module]]]:
    """(the blocks, of each the linear layers whose weights have these names, by the weight's). ValueError for a family whose
    blocks are not known and for weights that are no linear layer's in a block."""
    known = architecture(model)
    if known is None:
        raise ValueError(f"calibration goes block by block, and those of {family(model)} are not known; give another criterion "
                         "and budget, or add its family to raysearch/models/architectures.py")
    blocks: Any = model.get_submodule(known.blocks)
    modules = [{f"{known.blocks}.{index}.{path}.weight": module for path, module in block.named_modules()}
               for index, block in enumerate(blocks)]
    of_block = [{name: there[name] for name in names if name in there} for there in modules]
    missing = set(names) - {name for linears in of_block for name in linears}
    if missing:
        raise ValueError(f"calibration needs weights of linear layers inside the blocks, got {sorted(missing)[0]}; give "
                         "another criterion and budget")
    return blocks, of_block


@torch.no_grad()
def stream(model: PreTrainedModel, tokens: Tensor, is_counted: Sequence[bool], names: Sequence[str], statistic: Statistic,
           ) -> Iterator[dict[str, Tensor]]:
    """For each block in order, of the weights `names` in it: name -> `statistic` summed over this rank's sequences.

    tokens int64 [n, T] on the model's device; a sequence that is not counted only takes part: where weights are partitioned
    (ZeRO-3) every rank must call as often. A block's outputs are computed after the caller took its statistics, with the
    weights that it has then. ValueError, before the first block, as `linears_of_blocks`.
    """
    blocks, of_block = linears_of_blocks(model, names)
    model.eval()
    calls = [_calls(model, blocks, sequence[None]) for sequence in tokens]
    hidden = [call[0][0][0] for call in calls]
    for block, linears, *of_sequences in zip(blocks, of_block, *calls):
        sums: dict[str, Tensor] = {}
        for before, call, counts in zip(hidden, of_sequences, is_counted, strict=True):
            hooks = [linear.register_forward_pre_hook(_adding(sums, name, statistic, counts))
                     for name, linear in linears.items()]
            _output(block, before, call)
            for hook in hooks:
                hook.remove()
        assert len(sums) == len(linears), "a block calls each of its linear layers"
        yield sums
        hidden = [_output(block, before, call) for before, call in zip(hidden, of_sequences)]


def _adding(sums: dict[str, Tensor], name: str, statistic: Statistic, counts: bool) -> Callable[[nn.Module, Any], None]:
    def add(module: nn.Module, inputs: Any) -> None:
        part = statistic(inputs[0].flatten(0, -2)) * counts
        sums[name] = sums[name] + part if name in sums else part

    return add


def _output(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    inputs, named = call
    output = block(hidden, *inputs[1:], **named)
    return output if torch.is_tensor(output) else output[0]


def _calls(model: PreTrainedModel, blocks: Any, tokens: Tensor) -> list[Call]:
    """(inputs, named inputs) of each block for one sequence; hidden states of the first alone, which begins with them."""
    calls: list[Call] = []

    def keep(module: nn.Module, inputs: Any, named: Any) -> None:
        calls.append(((None if calls else inputs[0], *inputs[1:]), named))

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    model.base_model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls
