"""ONE table of what is known about model families, by Hugging Face's `model_type`: where heads and neurons lie.

A family that is not in it is pruned, stored and scored like any other; only what needs its parts (cutting them out, pruning
whole heads, sharing prefixes in scoring) is not done. To add one: a line here, and it runs through the conformance suite in
tests/models/test_architectures.py, which compares logits.

Left out on purpose: olmo2 and mixtral's experts (a norm over all heads, 3-D weights); mpt, whose slopes are not an argument of
its attention; mamba, which has no heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raysearch.models.model import Prunable, is_linear
from raysearch.pruning.patterns import Layout, Matrix, UnitRows


@dataclass(frozen=True)
class Attention:
    """Names in a block. Queries, keys and values are three matrices, or one that is `fused`."""

    module: str
    output: str
    fused: str = ""
    interleaved: bool = False
    """In the fused one: for each key-value head its queries, its key and its value, instead of all queries, all keys, all
    values."""
    head_size: str = "head_dim"
    """Attribute that holds it."""
    has_slopes: bool = False
    """Positions are slopes that belong to heads, which the argument `alibi` [B * H, 1, S] brings."""
    norms: tuple[str, ...] = ()
    """Of queries and of keys, which a configuration may ask for, with weights of each head's own: [H, E], or a list of H."""


@dataclass(frozen=True)
class MLP:
    """Names in a block: last(activation(first)), or last(up * activation(gate)) where there are two first ones."""

    module: str
    """Empty where the matrices lie in the block itself."""
    first: tuple[str, ...]
    last: str
    activation: str


@dataclass(frozen=True)
class Architecture:
    blocks: str
    """Path of the list of blocks in the model."""
    attention: Attention
    mlp: MLP
    shares_prefixes: bool = False
    """It takes a 4-D mask with position ids, and its logits are head(base_model(...)) and nothing more: tested against
    lm-eval. Any other family is scored by plain right-padded batches and its own logits."""


_LLAMA = Architecture("model.layers", Attention("self_attn", "o_proj"),
                      MLP("mlp", ("up_proj", "gate_proj"), "down_proj", "act_fn"))
_LLAMA_TREE = replace(_LLAMA, shares_prefixes=True)

MORE_THAN_ADD = {"do_layer_norm_before": False, "apply_residual_connection_post_layernorm": True}
"""Settings of families with which a block does more than add to what it gets: OPT 350M normalises the sum, and some of Bloom's
and Falcon's make go on with the normalised input."""

ARCHITECTURES = {
    "gpt2": Architecture("transformer.h", Attention("attn", "c_proj", fused="c_attn"), MLP("mlp", ("c_fc",), "c_proj", "act"),
                         shares_prefixes=True),
    "gpt_neo": Architecture("transformer.h", Attention("attn.attention", "out_proj"), MLP("mlp", ("c_fc",), "c_proj", "act")),
    "gptj": Architecture("transformer.h", Attention("attn", "out_proj"), MLP("mlp", ("fc_in",), "fc_out", "act")),
    "gpt_neox": Architecture(
        "gpt_neox.layers", Attention("attention", "dense", fused="query_key_value", interleaved=True, head_size="head_size"),
        MLP("mlp", ("dense_h_to_4h",), "dense_4h_to_h", "act"), shares_prefixes=True),
    "opt": Architecture("model.decoder.layers", Attention("self_attn", "out_proj"),
                        MLP("", ("fc1",), "fc2", "activation_fn"), shares_prefixes=True),
    "bloom": Architecture(
        "transformer.h", Attention("self_attention", "dense", fused="query_key_value", interleaved=True, has_slopes=True),
        MLP("mlp", ("dense_h_to_4h",), "dense_4h_to_h", "gelu_impl")),
    "falcon": Architecture(
        "transformer.h", Attention("self_attention", "dense", fused="query_key_value", interleaved=True, has_slopes=True),
        MLP("mlp", ("dense_h_to_4h",), "dense_4h_to_h", "act")),
    "gpt_bigcode": Architecture("transformer.h", Attention("attn", "c_proj", fused="c_attn", interleaved=True),
                                MLP("mlp", ("c_fc",), "c_proj", "act")),
    "starcoder2": Architecture("model.layers", Attention("self_attn", "o_proj"), MLP("mlp", ("c_fc",), "c_proj", "act")),
    "xglm": Architecture("model.layers", Attention("self_attn", "out_proj"), MLP("", ("fc1",), "fc2", "activation_fn")),
    "phi": Architecture("model.layers", Attention("self_attn", "dense"), MLP("mlp", ("fc1",), "fc2", "activation_fn")),
    "llama": _LLAMA_TREE,
    "mistral": _LLAMA_TREE,
    "qwen2": _LLAMA_TREE,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "stablelm": replace(_LLAMA, attention=replace(_LLAMA.attention, norms=("q_layernorm", "k_layernorm"))),
    "cohere": replace(_LLAMA, attention=replace(_LLAMA.attention, norms=("q_norm", "k_norm"))),
    "granite": _LLAMA,
    "olmo": _LLAMA,
}


def family(model: Any) -> str:
    """Its configuration's `model_type`; of what is no transformers model its class."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def architecture(model: Any) -> Architecture | None:
    """Of a transformers model; None for a family that is not known."""
    return ARCHITECTURES.get(family(model))


def shares_prefixes(model: Any) -> bool:
    """False for a family that the table does not say it of, or with windowed attention: plain batches, full logits."""
    known = architecture(model)
    return known is not None and known.shares_prefixes and not getattr(model.config, "sliding_window", None)


class Rows(NamedTuple):
    """Outputs of one matrix that belong to heads."""

    path: str
    """Of the matrix, inside the attention module."""
    of_head: Tensor
    """int64 [H, ...]: the outputs of each head."""


class Heads(NamedTuple):
    """The heads of one attention module; with grouped queries a head is a key-value head with its group of queries, and where
    all share one key-value head (multi-query attention) a head is a query alone.

    Legend: H heads of E dimensions, G queries for each.
    """

    path: str
    """Of the attention module, in the model."""
    num_heads: int
    num_values: int
    """Key-value heads: 1 in multi-query attention, else H."""
    size: int
    """E."""
    inputs: tuple[Rows, ...]
    """Queries, keys and values, in this order; a fused matrix stands once, and its rows of a head are the three's. Without keys
    and values where all heads share them."""
    values: Rows
    output: str
    read_by: Tensor
    """int64 [H, G * E]: the inputs of the output matrix that carry each head."""


def attention_heads(model: nn.Module, known: Architecture) -> Iterator[Heads]:
    """Where the heads of every block lie, on the CPU; blocks whose matrices are not plain linear layers are left out."""
    names = known.attention
    for index, block in enumerate(model.get_submodule(known.blocks)):
        module: Any = block.get_submodule(names.module)
        output = getattr(module, names.output)
        fused = getattr(module, names.fused) if names.fused else None
        parts = [fused] if fused is not None else [getattr(module, name) for name in ("q_proj", "k_proj", "v_proj")]
        if not all(is_linear(part) for part in (output, *parts)):
            continue
        size, width = int(getattr(module, names.head_size)), shape(output)[1]  # [D, H * G * E]
        num_values = (shape(fused)[0] - width) // 2 // size if fused is not None else shape(parts[2])[0] // size
        num_heads, groups = num_values, width // size // num_values
        head = torch.arange(num_values)[:, None]
        read_by = torch.arange(width).view(num_values, groups * size)
        if fused is None:
            paths = ("q_proj", "k_proj", "v_proj")
            query, key, value = head * groups * size, head * size, head * size  # the first row of each
        else:
            paths = (names.fused,) * 3
            query, key = head * groups * size, width + head * size
            value = key + num_values * size
            if names.interleaved:
                query = head * (groups + 2) * size
                key = query + groups * size
                value = key + size
        rows = tuple(first + torch.arange(count * size) for first, count in ((query, groups), (key, 1), (value, 1)))
        if num_values == 1 < groups:
            num_heads, read_by = groups, read_by.view(groups, size)
            inputs: tuple[Rows, ...] = (Rows(paths[0], rows[0].view(groups, size)),)
        elif fused is None:
            inputs = tuple(map(Rows, paths, rows))
        else:
            inputs = (Rows(names.fused, torch.cat(rows, dim=1)),)
        values = Rows(paths[2], rows[2].expand(num_heads, size))
        yield Heads(f"{known.blocks}.{index}.{names.module}", num_heads, num_values, size, inputs, values, names.output,
                    read_by)


def plain_mlps(model: nn.Module, known: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every block's MLP whose matrices are plain linear layers: the others, such as experts, are left out."""
    for index, block in enumerate(model.get_submodule(known.blocks)):
        module = block.get_submodule(known.mlp.module)
        if all(is_linear(getattr(module, name, None)) for name in (*known.mlp.first, known.mlp.last)):
            yield ".".join(filter(None, (known.blocks, str(index), known.mlp.module))), module


def layout(model: nn.Module, prunables: Sequence[Prunable]) -> Layout:
    """What patterns may know of the model: its prunable matrices with their biases, and where heads and neurons lie."""
    parameters = dict(model.named_parameters())

    def matrix(name: str, shape: tuple[int, int], transposed: bool) -> Matrix:
        bias = f"{name.removesuffix('weight')}bias"
        return Matrix(name, shape, transposed, bias if bias in parameters else None)

    matrices = {p.name: matrix(p.name, (p.shape[0], p.shape[1]), p.transposed) for p in prunables if len(p.shape) == 2}

    def rows(module: str, of_units: Sequence[tuple[str, Tensor, bool]]) -> list[UnitRows]:
        return [UnitRows(matrices[f"{module}.{path}.weight"], of_unit, are_inputs)
                for path, of_unit, are_inputs in of_units]

    known = architecture(model)
    attentions = [rows(heads.path, [(heads.output, heads.read_by, True), *((*each, False) for each in heads.inputs)])
                  for heads in (attention_heads(model, known) if known else ())]
    mlps = []
    for path, module in plain_mlps(model, known) if known else ():
        of_unit = torch.arange(shape(getattr(module, known.mlp.last))[1])[:, None]
        mlps.append(rows(path, [(known.mlp.last, of_unit, True), *((name, of_unit, False) for name in known.mlp.first)]))
    blocks = []
    more = [f"{name} {value}" for name, value in MORE_THAN_ADD.items() if known and getattr(model.config, name, None) is value]
    if known is not None and not more:
        for index in range(len(model.get_submodule(known.blocks))):
            blocks.append([each for name, each in matrices.items() if name.startswith(f"{known.blocks}.{index}.")])
    return Layout(list(matrices.values()), attentions, mlps, blocks, " with ".join([family(model), *more]))


def shape(linear: Any) -> tuple[int, int]:
    """(outputs, inputs) of an nn.Linear or of GPT-2's Conv1D, which keeps its weight the other way round."""
    rows, columns = getattr(linear.weight, "ds_shape", linear.weight.shape)  # ZeRO-3 leaves an empty tensor
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def dense_weight(linear: Any) -> Tensor:
    """[outputs, inputs] of an nn.Linear or Conv1D; it shares the layer's memory."""
    return linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()
