"""Lossless compaction: what pruning emptied is cut out, so that smaller dense products do the same work.

An MLP unit goes when nothing reads it (its column of the second matrix is zero) or when it is constant (its row of the
first one is zero); an attention head goes when nothing reads it or when its values are constant; a block goes when both of its
outputs are zero. Constants are folded into the bias behind them. It needs no kernel and saves the same share of time on any
hardware.

Legend: D hidden size, U units of an MLP, H heads of E dimensions (with grouped queries: key-value heads), G queries each.
"""

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from raysearch.models.architectures import (
    MLP,
    Architecture,
    Attention,
    Heads,
    architecture,
    attention_heads,
    dense_weight,
    family,
    plain_mlps,
    shape,
)
from raysearch.models.model import from_config, is_linear

MULTIPLE = 64
"""Widths stay multiples of this where they were: tensor cores are slow otherwise, so some dead units may stay."""
CHECK_TOKENS = 32
"""Of two sequences."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Of the largest logit: some 30 roundings of the type in a row, for the sums of the smaller products run in another order."""


WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
"""What configurations call the units of an MLP."""
Kept = Mapping[str, int | list[int]]
"""Path of a module -> the number of units of an MLP, the heads of an attention."""


class Compaction(NamedTuple):
    """What was cut out of a model."""

    num_units: int
    num_heads: int
    num_parameters: int
    """Fewer than before."""
    num_layers: int = 0
    """Whole blocks."""
    kept: Kept = MappingProxyType({})
    """Of each module that became smaller; paths are those of the blocks that stay."""


class Parts(NamedTuple):
    """How many each module has, by its id."""

    neurons: dict[int, int]
    heads: dict[int, int]


class CompactSize(NamedTuple):
    """What `compact` leaves of a model."""

    num_parameters: int
    num_bytes: int
    num_layers: int
    num_layers_before: int
    neurons: list[float]
    """Of each MLP that stays, the share of its units that do."""
    heads: list[float]
    """The same of the attentions."""
    num_weights: dict[str, int]
    """By path in the whole model, of each matrix that stays."""


class Zeros(NamedTuple):
    """Where a linear layer [O, K] holds nothing but zeros; on the CPU, as all that is known of a family's rows is."""

    outputs: Tensor
    """bool [O]."""
    inputs: Tensor
    """bool [K]."""
    bias: Tensor | None
    """[O]."""


ZerosOf = Callable[[Any], Zeros]
"""Of a linear layer of the model."""


def zeros_of(linear: Any) -> Zeros:
    is_zero = dense_weight(linear) == 0
    bias = None if linear.bias is None else linear.bias.detach().cpu()
    return Zeros(is_zero.all(dim=1).cpu(), is_zero.all(dim=0).cpu(), bias)


@torch.no_grad()
def compact(model: nn.Module, say: Callable[[str], object] = lambda line: None) -> Compaction:
    """Cuts dead blocks, MLP units and attention heads out of `model`, in place; its outputs stay equal up to rounding.

    A family that is not in the table of architectures is left as it is, and so is a model whose logits would change: its
    code may do with its heads what the table does not know. `say` then gets one line.
    """
    if (known := architecture(model)) is None:
        say(f"left dense: dead heads and neurons stay in, for those of {family(model)} are not known")
        return Compaction(0, 0, 0)
    whole = _state(model)
    done = _cut_dead(model, known, zeros_of)
    if done.num_layers + done.num_units + done.num_heads and not _gives_equal_logits(model, whole):
        say("left dense: dead heads and neurons stay in, for without them the model gives other logits")
        return Compaction(0, 0, 0)
    return done


def compact_size(config: PretrainedConfig, zeros: Mapping[str, Zeros], itemsize: int) -> CompactSize | None:
    """Of a model of this configuration whose matrices, by path, hold these zeros; None where `compact` cuts out nothing. No
    weight is needed. Where `compact` finds other logits, which this cannot know, it leaves the whole."""
    model = from_config(copy.deepcopy(config), torch.float32)
    if (known := architecture(model)) is None:
        return None
    path_of = {id(model.get_submodule(path)): path for path in zeros}
    before, num_layers = parts_of(model, known), len(model.get_submodule(known.blocks))
    done = _cut_dead(model, known, lambda linear: zeros[path_of[id(linear)]])
    if not done.num_parameters:
        return None
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_bytes = num_parameters * itemsize + buffer_bytes(model)
    num_weights = {path_of[id(each)]: each.weight.numel() for each in model.modules() if id(each) in path_of}
    return CompactSize(num_parameters, num_bytes, num_layers - done.num_layers, num_layers,
                       *shares(parts_of(model, known), before), num_weights)


def parts_of(model: nn.Module, known: Architecture) -> Parts:
    return Parts({id(mlp): shape(getattr(mlp, known.mlp.last))[1] for _, mlp in plain_mlps(model, known)},
                 {id(model.get_submodule(heads.path)): heads.num_heads for heads in attention_heads(model, known)})


def shares(after: Parts, before: Parts) -> tuple[list[float], list[float]]:
    """Of the neurons of each MLP and of the heads of each attention that are still there."""
    neurons, heads = ([now[module] / then[module] for module in now] for now, then in zip(after, before))
    return neurons, heads


def buffer_bytes(model: nn.Module) -> int:
    """Of the buffers that a file of the model holds."""
    stored = model.state_dict().keys()
    return sum(buffer.nbytes for name, buffer in model.named_buffers() if name in stored)


def _cut_dead(model: nn.Module, known: Architecture, zeros: ZerosOf) -> Compaction:
    before = sum(parameter.numel() for parameter in model.parameters())
    num_layers, num_units, num_heads = _drop_blocks(model, known, zeros), 0, 0
    kept: dict[str, int | list[int]] = {}
    for path, mlp in plain_mlps(model, known):
        if gone := _compact_mlp(mlp, known.mlp, zeros):
            num_units, kept[path] = num_units + gone, shape(getattr(mlp, known.mlp.last))[1]
    for heads in attention_heads(model, known):
        if stays := _compact_attention(model.get_submodule(heads.path), heads, known.attention, zeros):
            num_heads, kept[heads.path] = num_heads + heads.num_heads - len(stays), stays
    num_gone = before - sum(parameter.numel() for parameter in model.parameters())
    return Compaction(num_units, num_heads, num_gone, num_layers, kept)


def cut_to(model: nn.Module, kept: Kept) -> None:
    """Gives a model, also one without memory ("meta"), the shapes that `compact` left: for a caller that puts weights in."""
    known = architecture(model)
    assert known is not None, "what was cut is in the table"
    for path, mlp in plain_mlps(model, known):
        if isinstance(width := kept.get(path), int):
            _cut_mlp(mlp, known.mlp, torch.arange(width))
    for heads in attention_heads(model, known):
        if isinstance(stays := kept.get(heads.path), list):
            keep = torch.zeros(heads.num_heads, dtype=torch.bool)
            keep[stays] = True
            _cut_attention(model.get_submodule(heads.path), heads, keep, known.attention)


def plain_config(model: Any) -> PretrainedConfig | None:
    """The configuration of an ordinary model with the shapes of this compacted one, which any loader of Hugging Face's opens;
    None where blocks differ, and for a family whose configuration cannot say it."""
    known = architecture(model)
    assert known is not None, "what was cut is in the table"
    config = copy.deepcopy(model.config)
    widths = {shape(getattr(mlp, known.mlp.last))[1] for _, mlp in plain_mlps(model, known)}
    heads = {(each.read_by.numel() // each.size, each.num_values, each.size) for each in attention_heads(model, known)}
    try:
        (width,), ((queries, values, size),) = widths, heads
        for name in filter(config.to_dict().__contains__, WIDTHS):
            setattr(config, name, width)
        if queries != config.num_attention_heads:
            config.num_attention_heads, config.head_dim = queries, size
            for name in filter(config.to_dict().__contains__, ("num_key_value_heads", "num_kv_heads")):
                setattr(config, name, values)
        made = from_config(config, model.dtype)
    except Exception:  # of blocks that differ a ValueError; a configuration that cannot say it raises its family's own
        return None
    shapes = [{name: tuple(parameter.shape) for name, parameter in each.named_parameters()} for each in (made, model)]
    return config if shapes[0] == shapes[1] else None


def _drop_blocks(model: Any, known: Architecture, zeros: ZerosOf) -> int:
    """Takes out blocks whose two outputs are 0, which hand on what they get; the number of them."""
    blocks, lasts = model.get_submodule(known.blocks), (known.attention.output, known.mlp.last)
    stay = []
    for index, block in enumerate(blocks):
        outputs = [getattr(block.get_submodule(part.module), last) for part, last in zip((known.attention, known.mlp), lasts)]
        if not all(map(is_linear, outputs)) or any(not found.outputs.all() or (found.bias is not None and found.bias.any())
                                                   for found in map(zeros, outputs)):
            stay.append(index)
    stay, num_before = stay or [0], len(blocks)
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):  # GPT-2's: a block's place scales its attention
        stay = list(range(stay[-1] + 1))
    if len(stay) == num_before:
        return 0
    blocks._modules = {str(place): blocks[index] for place, index in enumerate(stay)}
    for place, block in enumerate(blocks):
        for module in block.modules():  # the cache's place of each
            for name in ("layer_idx", "layer_id"):
                if hasattr(module, name):
                    setattr(module, name, place)
    config = model.config
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == num_before:  # of each layer its kind
            setattr(config, name, [value[index] for index in stay])
    if hasattr(config, "attention_types"):  # GPT-Neo's, from which it makes the kinds again
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = len(stay)
    return num_before - len(stay)


State = list[tuple[Any, dict[str, Any]]]


def _state(model: Any) -> State:
    """Attributes, parameters and hooks of every module, and the configuration; nothing is copied, for cutting puts new ones in
    their place."""
    return [(part, {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(part).items()})
            for part in (*model.modules(), model.config)]


def _restore(state: State) -> None:
    for module, attributes in state:
        vars(module).update(attributes)


def _gives_equal_logits(model: nn.Module, whole: State) -> bool:
    """Whether the cut model gives the logits of the whole one, on a few tokens; where not, it is made whole again."""
    parameter = next(model.parameters())
    cut = _state(model)
    try:
        after = few_logits(model)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):  # shapes that do not go together
        after = None
    _restore(whole)
    is_equal = after is not None and are_close(after, few_logits(model), parameter.dtype)
    if is_equal:
        _restore(cut)
    return is_equal


@torch.no_grad()
def few_logits(model: Any) -> Tensor:
    """fp32, of a few tokens."""
    tokens = torch.arange(CHECK_TOKENS, device=model.device).view(2, -1) % model.config.get_text_config().vocab_size
    return model(input_ids=tokens, use_cache=False).logits.float()


def are_close(logits: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether they differ by no more than rounding, of a model of `dtype`."""
    return bool((logits - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max())


def _compact_mlp(mlp: Any, names: MLP, zeros: ZerosOf) -> int:
    """The number of units that were cut out."""
    firsts, last = [zeros(getattr(mlp, name)) for name in names.first], getattr(mlp, names.last)
    activation = getattr(mlp, names.activation)
    unread = zeros(last).inputs  # [U]
    rows_dead = [first.outputs for first in firsts]
    constants = torch.zeros(len(unread))
    if len(firsts) == 1:
        constant = rows_dead[0]
        bias = constants if firsts[0].bias is None else firsts[0].bias
        constants = torch.where(constant & ~unread, activation(bias), 0)
    else:  # up * act(gate): zero where either is
        biases = [torch.zeros_like(dead) if first.bias is None else first.bias != 0 for first, dead in zip(firsts, rows_dead)]
        constant = (rows_dead[0] & ~biases[0]) | (rows_dead[1] & ~biases[1] & (activation(torch.zeros(1)) == 0).item())
    keep = _kept(unread | constant, MULTIPLE if len(unread) % MULTIPLE == 0 else 1)
    if keep.all() or not _fold(last, torch.where(keep, 0, constants)):
        return 0
    _cut_mlp(mlp, names, keep.nonzero().view(-1))
    return int((~keep).sum())


def _cut_mlp(mlp: Any, names: MLP, keep: Tensor) -> None:
    for name in names.first:
        _cut(getattr(mlp, name), keep, 0)
    _cut(getattr(mlp, names.last), keep, 1)


def _compact_attention(module: Any, heads: Heads, names: Attention, zeros: ZerosOf) -> list[int]:
    """The heads that stay; empty where all do."""
    last, values = getattr(module, heads.output), zeros(getattr(module, heads.values.path))
    unread = zeros(last).inputs[heads.read_by].all(dim=1)  # [H]
    constant = values.outputs[heads.values.of_head].all(dim=1)
    keep = _kept(unread | constant, 1)
    constants = torch.zeros(heads.read_by.numel(), dtype=torch.float64)
    if values.bias is not None:  # constant values give the attention's output their bias, whatever it attends to
        each = torch.where((constant & ~unread & ~keep)[:, None], values.bias[heads.values.of_head].double(), 0)  # [H, E]
        groups = heads.read_by.shape[1] // heads.size
        constants[heads.read_by] = each[:, None].expand(-1, groups, -1).reshape(heads.num_heads, -1)
    if keep.all() or not _fold(last, constants):
        return []
    _cut_attention(module, heads, keep, names)
    return keep.nonzero().view(-1).tolist()


def _cut_attention(module: Any, heads: Heads, keep: Tensor, names: Attention) -> None:
    for path, of_head in heads.inputs:
        stays = torch.ones(shape(getattr(module, path))[0], dtype=torch.bool)
        stays[of_head[~keep]] = False  # rows of no head, such as shared keys, stay
        _cut(getattr(module, path), stays.nonzero().view(-1), 0)
    _cut(getattr(module, heads.output), heads.read_by[keep].reshape(-1), 1)
    kept, queries = int(keep.sum()), int(heads.read_by[keep].numel()) // heads.size
    num_values = kept if heads.num_values == heads.num_heads else heads.num_values
    for name, number in (("num_heads", queries), ("num_attention_heads", queries), ("num_key_value_heads", num_values),
                         ("num_kv_heads", num_values), ("num_key_value_groups", queries // num_values),
                         ("split_size", queries * heads.size), ("embed_dim", queries * heads.size)):
        if hasattr(module, name):
            setattr(module, name, number)
    of_queries = keep.repeat_interleave(heads.read_by.shape[1] // heads.size)
    for name, stays in zip(names.norms, (of_queries, keep if heads.num_values == heads.num_heads else None)):
        if stays is not None and (norm := getattr(module, name, None)) is not None:
            _cut_norm(norm, stays.nonzero().view(-1))
    if names.has_slopes:
        module.register_forward_pre_hook(_with_slopes_of(of_queries), with_kwargs=True)


def _cut_norm(norm: Any, keep: Tensor) -> None:
    if hasattr(norm, "norms"):
        norm.norms = nn.ModuleList(norm.norms[head] for head in keep)
    else:
        norm.weight = nn.Parameter(norm.weight.detach()[keep.to(norm.weight.device)], requires_grad=norm.weight.requires_grad)


def _with_slopes_of(keep: Tensor) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A hook that gives an attention module the slopes of its kept heads of queries, and their masks [B, H, S, S]."""
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
    if last.bias.is_meta:
        return True
    weight = dense_weight(last).double()
    folded = (weight @ constants.to(weight)).to(last.bias.dtype)
    last.bias = nn.Parameter(last.bias.detach() + folded, requires_grad=last.bias.requires_grad)
    return True


def _cut(linear: Any, keep: Tensor, dimension: int) -> None:
    """Keeps these outputs (0) or inputs (1) of an nn.Linear or Conv1D."""
    axis, keep = 1 - dimension if isinstance(linear, Conv1D) else dimension, keep.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(axis, keep), requires_grad=linear.weight.requires_grad)
    if dimension == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[keep], requires_grad=linear.bias.requires_grad)
    width = len(keep)
    if isinstance(linear, Conv1D):
        setattr(linear, "nf" if dimension == 0 else "nx", width)
    else:
        setattr(linear, "out_features" if dimension == 0 else "in_features", width)
