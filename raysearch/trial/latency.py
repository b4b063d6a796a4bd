"""How long a candidate would take to serve, from times that its study measures once.

Timed are the dense model and others like it with less in them: fewer neurons in every MLP, fewer heads, fewer layers, and
random masks of each form that a kernel may win with, by density. Every one is timed whole, beside the dense model, for the
times of single layers do not add up to a model's (docs/log.md, 2026-11-27). A candidate's time lies between these, layer by
layer.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from raysearch.config import ServingSettings
from raysearch.evaluation.speed import speeds
from raysearch.kernels.device import device_name
from raysearch.kernels.weight import random_mask
from raysearch.models.architectures import Architecture, architecture, attention_heads, dense_weight, plain_mlps
from raysearch.models.compact import CompactSize, compact, parts_of, shares
from raysearch.models.model import load_model, on_device
from raysearch.models.sparse import MIN_SPARSITY, linear_layers, sparsify_for_inference
from raysearch.study.provenance import provenance
from raysearch.study.records import Curve, Latency
from raysearch.training.hardware import threads

KEPT = (0.5, 0.125)
"""Shares of neurons and heads that are timed, beside all of them."""
DENSITIES = (0.03, 0.08, 0.15, 0.3, 0.5)
BLOCKS = {"unstructured": 1, "2:4": 1, "block": 32, "block64": 64}
"""Patterns that kernels take, and the sides of their blocks; any other is served like single weights."""

Ratio = Callable[[Any], float]
"""A model's time over the dense one's."""


class Weights(NamedTuple):
    """Of a linear layer, as it stays."""

    num_weights: int
    density: float


def predicted_ms(latency: Latency, left: CompactSize | None, layers: Sequence[Weights], pattern: str) -> float:
    """Of a batch of `latency.serving`, of a candidate in the form that is served: what is `left` of the model (None: all), its
    linear `layers` on sparse kernels where those win with the last round's `pattern`."""
    gained = 0.0
    if left is not None:
        neurons = sum(1 - _at(share, latency.neurons) for share in left.neurons)
        heads = sum(1 - _at(share, latency.heads) for share in left.heads)
        layer = (2 - latency.neurons[0][1] - latency.heads[0][1]) / left.num_layers_before + latency.layer
        gained = (neurons + heads) / left.num_layers_before + layer * (left.num_layers_before - left.num_layers)
    curve = latency.masked.get(pattern, latency.masked["unstructured"])
    num_weights = sum(layer.num_weights for layer in layers)
    masked = sum(layer.num_weights * _at(layer.density, curve) for layer in layers) / num_weights if num_weights else 1.0
    return latency.dense_ms * (1 - gained) * masked


def _at(share: float, curve: Curve) -> float:
    return float(np.interp(share, *zip(*curve)))


@torch.no_grad()
def measured_latency(model_path: str, dtype: torch.dtype, serving: ServingSettings) -> Latency:
    """On this machine, on which nothing else should run meanwhile; with all of a CPU's cores, as it is served."""
    dense, dense_ms = on_device(load_model(model_path, dtype)), []

    def ratio(model: Any) -> float:
        one, other = (served.batch_ms(serving) for served in speeds([dense, model], **serving.model_dump()))
        dense_ms.append(one)
        return other / one

    with threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()):  # the latter on macOS
        neurons, heads, layer = _cut_curves(dense, ratio)
        masked = {pattern: _masked_curve(dense, pattern, serving.tokens_at_once, ratio) for pattern in BLOCKS}
        ratio(dense)
        return Latency(serving=serving, dense_ms=float(np.median(dense_ms)), neurons=neurons, heads=heads, layer=layer,
                       masked=masked, provenance=provenance(device_name(str(dense.device))))


def _cut_curves(dense: Any, ratio: Ratio) -> tuple[Curve, Curve, float]:
    """(by neurons, by heads, what a layer takes besides), each measured where what came before is cut out already."""
    neurons, heads = [(1.0, 1.0)], [(1.0, 1.0)]
    if (known := architecture(dense)) is None:
        return tuple(neurons), tuple(heads), 0.0
    less, gained = copy.deepcopy(dense), 0.0
    whole = parts_of(less, known)
    for curve, which in ((neurons, 0), (heads, 1)):
        for share in KEPT:
            for module, weight, columns in (_heads if which else _neurons)(less, known):
                weight[:, columns[max(1, round(share * whole[which][id(module)])):].reshape(-1)] = 0
            compact(less)
            if (kept := float(np.mean(shares(parts_of(less, known), whole)[which]))) < curve[-1][0]:
                curve.append((kept, ratio(less) + gained))
        gained += 1 - curve[-1][1]
    num_gone = len(less.get_submodule(known.blocks)) // 2
    for block in less.get_submodule(known.blocks)[:num_gone]:
        for part, name in ((known.attention, known.attention.output), (known.mlp, known.mlp.last)):
            for parameter in getattr(block.get_submodule(part.module), name).parameters():
                parameter.zero_()
    num_gone = compact(less).num_layers
    return tuple(neurons[::-1]), tuple(heads[::-1]), (1 - gained - ratio(less)) / num_gone if num_gone else 0.0


Readers = Iterator[tuple[nn.Module, Tensor, Tensor]]
"""(module, the matrix [O, K] behind its units, int64 [units, ...]: the columns that read each)."""


def _neurons(model: Any, known: Architecture) -> Readers:
    for _, mlp in plain_mlps(model, known):
        weight = dense_weight(getattr(mlp, known.mlp.last))
        yield mlp, weight, torch.arange(weight.shape[1], device=weight.device)[:, None]


def _heads(model: Any, known: Architecture) -> Readers:
    for heads in attention_heads(model, known):
        module = model.get_submodule(heads.path)
        yield module, dense_weight(getattr(module, heads.output)), heads.read_by


def _masked_curve(dense: Any, pattern: str, num_tokens: tuple[int, int], ratio: Ratio) -> Curve:
    """From the sparsest on, until no kernel wins any more."""
    curve, chance = [], torch.Generator().manual_seed(0)
    for density in (0.5,) if pattern == "2:4" else DENSITIES:
        model = copy.deepcopy(dense)
        for _, _, _, layer in linear_layers(model):
            weight = dense_weight(layer)
            weight *= random_mask(weight.shape, pattern, BLOCKS[pattern], density, chance).to(weight.device)
        if all(gain <= 1 for gain in sparsify_for_inference(model, num_tokens=num_tokens).model_ratio.values()):
            break
        curve.append((density, ratio(model)))
    return (*curve, (1 - MIN_SPARSITY, 1.0))
