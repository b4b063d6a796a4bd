"""Bytes of a candidate in the forms that can be exported, counted on the shards: nothing is gathered but biases."""

import math
from typing import NamedTuple

import torch

from raysearch.models.compact import Zeros, buffer_bytes, compact_size
from raysearch.models.sparse import linear_layers
from raysearch.models.weights import stored_bytes
from raysearch.study.records import Latency
from raysearch.training.engine import Engine
from raysearch.trial.latency import Weights, predicted_ms

EXPORT_ITEMSIZE = {"float32": 4, "bfloat16": 2}


class Weighed(NamedTuple):
    """An engine's weights, counted: by parameter, and as in `RoundRecord`."""

    nonzero: dict[str, int]
    kept: dict[str, int]
    """By what the masks say."""
    num_nonzero: int
    stored_bytes: int
    resident_bytes: int
    compact_parameters: int | None
    predicted_ms: float | None


def weighed(engine: Engine, dtype: str, latency: Latency | None = None, pattern: str = "") -> Weighed:
    """The engine's weights, exported in `dtype`; `pattern`: that of their last round. Collective."""
    nonzero, kept = engine.nonzero_counts(), engine.kept_counts()
    itemsize, buffers = EXPORT_ITEMSIZE[dtype], buffer_bytes(engine.model)
    total = {name: math.prod(shape) for name, shape in engine.shapes.items()}
    stored = buffers + sum(stored_bytes(total[name], kept[name] if name in engine.prunable_names else total[name], itemsize)
                           for name in total)  # no export has a bitmap of a bias
    zeros = empty_lines(engine)
    cut = compact_size(engine.model.config, zeros, itemsize) if zeros else None
    milliseconds = None
    if latency is not None:
        linear = {name for name, *_ in linear_layers(engine.model)}
        whole = {name: total[f"{name}.weight"] for name in linear if f"{name}.weight" in engine.prunable_names}
        stays = whole if cut is None else cut.num_weights
        milliseconds = predicted_ms(latency, cut, [Weights(stays[name], min(1.0, kept[f"{name}.weight"] / stays[name]))
                                                   for name in whole if name in stays], pattern)
    forms = (stored, buffers + sum(total.values()) * itemsize, None) if cut is None else (
        min(stored, cut.num_bytes), cut.num_bytes, cut.num_parameters)
    return Weighed(nonzero, kept, sum(nonzero.values()), *forms, milliseconds)


@torch.no_grad()
def empty_lines(engine: Engine) -> dict[str, Zeros]:
    """By path of each prunable matrix where its rows and columns are all zero; nothing where none is. On the CPU."""
    matrices = [prunable for prunable in engine.prunables if len(prunable.shape) == 2]
    here, parts = {shard.name: shard for shard in engine.prunable_shards}, []
    for prunable in matrices:
        num_rows, num_columns = prunable.shape
        lives = torch.zeros(num_rows + num_columns, dtype=torch.int32, device=engine.device)
        if (shard := here.get(prunable.name)) is not None and shard.values.numel():
            row, column = divmod(shard.start, num_columns)
            height = -(-(column + shard.values.numel()) // num_columns)
            table = torch.zeros(height * num_columns, dtype=torch.bool, device=engine.device)
            table[column:column + shard.values.numel()] = shard.values != 0
            lives[row:row + height] = table.view(height, num_columns).any(1).int()
            lives[num_rows:] = table.view(height, num_columns).any(0).int()
        parts.append(lives)
    is_empty = engine.all_reduce(torch.cat(parts)).cpu() == 0
    if not is_empty.any():
        return {}
    found = {}
    for prunable, both in zip(matrices, is_empty.split([len(part) for part in parts])):
        rows, columns = both.split(prunable.shape)
        path = prunable.name.removesuffix(".weight")
        bias = engine.gather(f"{path}.bias").cpu() if f"{path}.bias" in engine.shapes else None
        found[path] = Zeros(*((columns, rows) if prunable.transposed else (rows, columns)), bias)
    return found
