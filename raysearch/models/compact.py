"""Lossless compaction: what pruning emptied is cut out, so that smaller dense products do the same work.

An MLP unit goes when nothing reads it (its column of the second matrix is zero) or when it is constant (its row of the
first one is zero); an attention head goes when nothing reads it or when its values are constant. Constants are folded into
the bias behind them. It needs no kernel and saves the same share of time on any hardware.

Legend: D hidden size, U units of an MLP, H heads of E dimensions (with grouped queries: key-value heads), G queries each.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raysearch.models.architectures import Heads, architecture, attention_heads, dense_weight, shape
from raysearch.models.model import is_linear

MULTIPLE = 64
"""Widths stay multiples of this where they were: tensor cores are slow otherwise, so some dead units may stay."""
CHECK_TOKENS = 32
"""Of two sequences."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Of the largest logit: some 30 roundings of the type in a row, for the sums of the smaller products run in another order."""


class Compaction(NamedTuple):
    """What was cut out of a model."""

    num_units: int
    num_heads: int
    num_parameters: int
    """Fewer than before."""


@torch.no_grad()
def compact(model: nn.Module, say: Callable[[str], object] = lambda line: None) -> Compaction:
    """Cuts dead MLP units and attention heads out of `model`, in place; its outputs stay equal up to rounding.

    A family that is not in the table of architectures is left as it is, and so is a model whose logits would change: its
    code may do with its heads what the table does not know. `say` then gets one line.
    """
    if (known := architecture(model)) is None:
        name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        say(f"left dense: dead heads and neurons stay in, for those of {name} are not known")
        return Compaction(0, 0, 0)
    before, whole = sum(parameter.numel() for parameter in model.parameters()), _state(model)
    num_units = num_heads = 0
    for block in model.get_submodule(known.blocks):
        mlp = block.get_submodule(known.mlp.module)
        matrices = [getattr(mlp, name, None) for name in (*known.mlp.first, known.mlp.last)]
        if all(is_linear(matrix) for matrix in matrices):
            num_units += _compact_mlp(matrices[:-1], matrices[-1], getattr(mlp, known.mlp.activation))
    for heads in attention_heads(model, known):
        num_heads += _compact_attention(model.get_submodule(heads.path), heads, known.attention.has_slopes)
    if num_units + num_heads and not _gives_equal_logits(model, whole):
        say("left dense: dead heads and neurons stay in, for without them the model gives other logits")
        return Compaction(0, 0, 0)
    return Compaction(num_units, num_heads, before - sum(parameter.numel() for parameter in model.parameters()))


State = list[tuple[nn.Module, dict[str, Any]]]


def _state(model: nn.Module) -> State:
    """Attributes, parameters and hooks of every module; nothing is copied, for cutting puts new ones in their place."""
    return [(module, {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(module).items()})
            for module in model.modules()]


def _restore(state: State) -> None:
    for module, attributes in state:
        vars(module).update(attributes)


def _gives_equal_logits(model: nn.Module, whole: State) -> bool:
    """Whether the cut model gives the logits of the whole one, on a few tokens; where not, it is made whole again."""
    parameter = next(model.parameters())
    tokens = torch.arange(CHECK_TOKENS, device=parameter.device).view(2, -1) % model.config.get_text_config().vocab_size
    cut = _state(model)
    try:
        after = model(input_ids=tokens, use_cache=False).logits.float()
    except (RuntimeError, ValueError, TypeError, AttributeError):  # shapes that do not go together
        after = None
    _restore(whole)
    before = model(input_ids=tokens, use_cache=False).logits.float()
    is_equal = after is not None and bool((after - before).abs().max() <= TOLERANCE[parameter.dtype] * before.abs().max())
    if is_equal:
        _restore(cut)
    return is_equal


def _compact_mlp(firsts: Sequence[Any], last: Any, activation: nn.Module) -> int:
    unread = (dense_weight(last) == 0).all(dim=0)  # [U]
    rows_dead = [(dense_weight(first) == 0).all(dim=1) for first in firsts]
    constants = torch.zeros_like(dense_weight(last)[0])
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


def _compact_attention(module: Any, heads: Heads, has_slopes: bool) -> int:
    last, values = getattr(module, heads.output), getattr(module, heads.values.path)
    unread = (dense_weight(last) == 0).all(dim=0)[heads.read_by].all(dim=1)  # [H]
    constant = (dense_weight(values) == 0).all(dim=1)[heads.values.of_head].all(dim=1)
    keep = _kept(unread | constant, 1)
    constants = torch.zeros(heads.read_by.numel(), dtype=last.weight.dtype, device=last.weight.device)
    if values.bias is not None:  # constant values give the attention's output their bias, whatever it attends to
        each = torch.where((constant & ~unread & ~keep)[:, None], values.bias[heads.values.of_head], 0)  # [H, E]
        groups = heads.read_by.shape[1] // heads.size
        constants[heads.read_by] = each[:, None].expand(-1, groups, -1).reshape(heads.num_heads, -1)
    if keep.all() or not _fold(last, constants):
        return 0
    for path, of_head in heads.inputs:
        stays = torch.ones(shape(getattr(module, path))[0], dtype=torch.bool, device=keep.device)
        stays[of_head[~keep]] = False  # rows of no head, such as shared keys, stay
        _cut(getattr(module, path), stays.nonzero().view(-1), 0)
    _cut(last, heads.read_by[keep].reshape(-1), 1)
    kept, queries = int(keep.sum()), int(heads.read_by[keep].numel()) // heads.size
    num_values = kept if heads.num_values == heads.num_heads else heads.num_values
    for name, number in (("num_heads", queries), ("num_attention_heads", queries), ("num_key_value_heads", num_values),
                         ("num_kv_heads", num_values), ("num_key_value_groups", queries // num_values),
                         ("split_size", queries * heads.size), ("embed_dim", queries * heads.size)):
        if hasattr(module, name):
            setattr(module, name, number)
    if has_slopes:
        module.register_forward_pre_hook(_with_slopes_of(keep), with_kwargs=True)
    return heads.num_heads - kept


def _with_slopes_of(keep: Tensor) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A hook that gives an attention module the slopes of its kept heads, and their masks [B, H, S, S]."""
    def select(_: nn.Module, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        slopes, mask = named.get("alibi"), named.get("attention_mask")
        if slopes is not None:
            by_head = slopes if slopes.ndim == 4 else slopes.unflatten(0, (-1, len(keep)))  # Falcon's, Bloom's
            named["alibi"] = by_head[:, keep].view(-1, *slopes.shape[1:]) if slopes.ndim == 3 else by_head[:, keep]
            if mask is not None and mask.shape[1] == len(keep):
                named["attention_mask"] = mask[:, keep]
        return inputs, named

    return select


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
    folded = (dense_weight(last).double() @ constants.double()).to(last.bias.dtype)
    last.bias = nn.Parameter(last.bias.detach() + folded, requires_grad=last.bias.requires_grad)
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
