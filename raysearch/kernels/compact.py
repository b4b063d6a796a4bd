"""Lossless compaction: what pruning emptied is cut out, so that smaller dense products do the same work.

An MLP unit goes when nothing reads it (its column of the second matrix is zero) or when it is constant (its row of the
first one is zero); an attention head goes when nothing reads it or when its values are constant. Constants are folded into
the bias behind them. It needs no kernel and saves the same share of time on any hardware.

Legend: D hidden size, U units of an MLP, H heads of E dimensions (with grouped queries: key-value heads), G queries each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MULTIPLE = 64
"""Widths stay multiples of this where they were: tensor cores are slow otherwise, so some dead units may stay."""

MLPS = ((("c_fc",), "c_proj", "act"), (("dense_h_to_4h",), "dense_4h_to_h", "act"), (("fc1",), "fc2", "activation_fn"),
        (("up_proj", "gate_proj"), "down_proj", "act_fn"))
"""Names of an MLP's first matrices, its second one and its activation: GPT-2, GPT-NeoX, OPT, Llama and its like."""


PLAIN = (nn.Linear, Conv1D)


class Compaction(NamedTuple):
    """What was cut out of a model."""

    num_units: int
    num_heads: int
    num_parameters: int
    """Fewer than before."""


@torch.no_grad()
def compact(model: nn.Module) -> Compaction:
    """Cuts dead MLP units and attention heads out of `model`, in place; its outputs stay equal up to rounding.

    Model families that it does not know are left as they are.
    """
    before = sum(parameter.numel() for parameter in model.parameters())
    num_units = num_heads = 0
    for module in model.modules():
        for names, last, activation in MLPS:
            if hasattr(module, activation) and all(isinstance(getattr(module, name, None), PLAIN) for name in (*names, last)):
                num_units += _compact_mlp([getattr(module, name) for name in names], getattr(module, last),
                                          getattr(module, activation))
        num_heads += _compact_attention(module)
    return Compaction(num_units, num_heads, before - sum(parameter.numel() for parameter in model.parameters()))


def _compact_mlp(firsts: Sequence[nn.Module], last: nn.Module, activation: nn.Module) -> int:
    unread = (_weight(last) == 0).all(dim=0)  # [U]
    rows_dead = [(_weight(first) == 0).all(dim=1) for first in firsts]
    constants = torch.zeros_like(_weight(last)[0])
    if len(firsts) == 1:
        constant = rows_dead[0]
        bias = firsts[0].bias if firsts[0].bias is not None else constants
        constants = torch.where(constant & ~unread, activation(bias.detach()), 0)
    else:  # up * act(gate): zero where either is
        biases = [torch.zeros_like(dead) if first.bias is None else first.bias != 0 for first, dead in zip(firsts, rows_dead)]
        constant = (rows_dead[0] & ~biases[0]) | (rows_dead[1] & ~biases[1] & (activation(torch.zeros(1)) == 0).item())
    keep = _kept(unread | constant, MULTIPLE if len(unread) % MULTIPLE == 0 else 1)
    if keep.all() or not _fold(last, torch.where(keep, 0, constants)):
        return 0
    for first in firsts:
        _cut(first, keep.nonzero().view(-1), 0)
    _cut(last, keep.nonzero().view(-1), 1)
    return int((~keep).sum())


def _compact_attention(module: Any) -> int:
    last = next((getattr(module, name) for name in ("c_proj", "dense", "out_proj", "o_proj") if hasattr(module, name)), None)
    if not isinstance(last, PLAIN):
        return 0
    width = _weight(last).shape[1]  # H * G * E
    if hasattr(module, "c_attn") and hasattr(module, "split_size"):  # GPT-2: [queries, keys, values], heads inside
        size, firsts = module.head_dim, [(module.c_attn, [0, width, 2 * width])]
        strides, groups = module.head_dim, 1
    elif hasattr(module, "query_key_value"):  # GPT-NeoX: heads, [query, key, value] inside
        size, firsts = module.head_size, [(module.query_key_value, [0, module.head_size, 2 * module.head_size])]
        strides, groups = 3 * module.head_size, 1
    elif all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "head_dim")):
        size, firsts = module.head_dim, [(module.k_proj, [0]), (module.v_proj, [0])]
        strides, groups = module.head_dim, getattr(module, "num_key_value_groups", 1)
    else:
        return 0
    if not all(isinstance(linear, PLAIN) for linear, _ in firsts):
        return 0
    num_heads = width // size // groups
    within = torch.arange(size, device=last.weight.device)
    starts = torch.arange(num_heads, device=last.weight.device)[:, None] * strides
    outputs = [(linear, [starts + offset + within for offset in offsets]) for linear, offsets in firsts]  # [H, E] rows each
    read_by = torch.arange(width, device=last.weight.device).view(num_heads, groups * size)
    values, value_rows = outputs[-1][0], outputs[-1][1][-1]

    unread = (_weight(last) == 0).all(dim=0)[read_by].all(dim=1)  # [H]
    constant = (_weight(values) == 0).all(dim=1)[value_rows].all(dim=1)
    keep = _kept(unread | constant, 1)
    constants = torch.zeros(width, dtype=last.weight.dtype, device=last.weight.device)
    if values.bias is not None:
        each = torch.where((constant & ~unread & ~keep)[:, None], values.bias[value_rows], 0)  # [H, E]
        constants[read_by] = each[:, None].expand(-1, groups, -1).reshape(num_heads, -1)
    if keep.all() or not _fold(last, constants):
        return 0
    if hasattr(module, "q_proj"):
        outputs.append((module.q_proj, [read_by]))
    for linear, blocks in outputs:
        rows = torch.cat([rows[keep].reshape(-1) for rows in blocks])
        _cut(linear, rows.sort().values, 0)
    _cut(last, read_by[keep].reshape(-1), 1)
    kept = int(keep.sum())
    if hasattr(module, "split_size"):
        module.split_size = kept * size
    if hasattr(module, "num_heads"):
        module.num_heads = kept * groups
    return num_heads - kept


def _weight(linear: Any) -> Tensor:
    """[outputs, inputs]."""
    return linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()


def _kept(dead: Tensor, multiple: int) -> Tensor:
    """Which stay: all that live, and as many of the dead as fill up to a multiple, at least one in all."""
    num_kept = max(1, -(-int((~dead).sum()) // multiple)) * multiple
    order = dead.to(torch.uint8).argsort(stable=True)  # the living first
    keep = torch.zeros_like(dead)
    keep[order[:num_kept]] = True
    return keep


def _fold(last: Any, constants: Tensor) -> bool:
    """Adds the matrix's product with these constant inputs to its bias; False where it has none to add it to."""
    if not constants.any():
        return True
    if last.bias is None:
        return False
    last.bias += (_weight(last).double() @ constants.double()).to(last.bias.dtype)
    return True


def _cut(linear: Any, keep: Tensor, dimension: int) -> None:
    """Keeps these outputs (0) or inputs (1) of an nn.Linear or Conv1D."""
    axis = 1 - dimension if isinstance(linear, Conv1D) else dimension
    linear.weight = nn.Parameter(linear.weight.detach().index_select(axis, keep), requires_grad=linear.weight.requires_grad)
    if dimension == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[keep], requires_grad=linear.bias.requires_grad)
    width = len(keep)
    if isinstance(linear, Conv1D):
        setattr(linear, "nf" if dimension == 0 else "nx", width)
    else:
        setattr(linear, "out_features" if dimension == 0 else "in_features", width)
