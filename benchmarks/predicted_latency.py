"""How far `predicted_ms` is from what `raysearch measure` finds, for random candidates of one model.

    python benchmarks/predicted_latency.py [--model tiny] [--candidates 16] [--threads 1] [--serving 8 96 32]

The table is measured once, as a study does. Then candidates that no table holds (heads, neurons and layers gone at random, each
layer another number; masks at random densities, of each layer another one; both) are cut down, put on sparse kernels and timed
beside the dense model. Errors are of the time over the dense model's: a shared machine is not equally fast all the time. Prints
one JSON line.
"""

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from random_study import model_folder

from raysearch.config import ServingSettings
from raysearch.evaluation.speed import speeds
from raysearch.kernels.device import device_name
from raysearch.models.architectures import architecture, dense_weight
from raysearch.models.compact import compact_size, zeros_of
from raysearch.models.model import load_model, on_device
from raysearch.models.sparse import linear_layers, sparsify_for_inference
from raysearch.study.records import Latency
from raysearch.trial import latency as module
from raysearch.trial.latency import Weights, measured_latency, predicted_ms


def thin(model: Any, chance: random.Random, kind: str) -> None:
    """Takes out what a search of structured, unstructured or mixed pruning might."""
    known = architecture(model)
    assert known is not None
    if kind != "unstructured":
        for readers in (module._neurons, module._heads):
            for _, weight, columns in readers(model, known):
                stays = chance.choice((1.0, chance.uniform(0.1, 1.0)))
                weight[:, columns[max(1, round(stays * len(columns))):].reshape(-1)] = 0
        blocks = model.get_submodule(known.blocks)
        for index in chance.sample(range(len(blocks)), chance.randrange(len(blocks) // 2 + 1)):
            for part, name in ((known.attention, known.attention.output), (known.mlp, known.mlp.last)):
                for parameter in getattr(blocks[index].get_submodule(part.module), name).parameters():
                    parameter.zero_()
    if kind != "structured":
        mean = chance.uniform(0.02, 0.4)
        for *_, layer in linear_layers(model):
            layer.weight *= (torch.rand_like(layer.weight.float()) < mean * chance.uniform(0.7, 1.3)).to(layer.weight.dtype)


def predicted(latency: Latency, model: Any) -> float:
    """What the engine's `sizes` predicts, of a model that holds its zeros."""
    layers = {name: layer for name, _, _, layer in linear_layers(model)}
    cut = compact_size(model.config, {name: zeros_of(layer) for name, layer in layers.items()}, 4)
    stays = {name: layer.weight.numel() for name, layer in layers.items()} if cut is None else cut.num_weights
    return predicted_ms(latency, cut, [
        Weights(number, min(1.0, int(dense_weight(layers[name]).count_nonzero()) / number)) for name, number in stays.items()],
        "unstructured")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runs", type=int, default=3, help="of 20 rounds, whose median counts")
    parser.add_argument("--serving", type=int, nargs=3, default=(8, 96, 32))
    options = parser.parse_args()
    serving = ServingSettings(**dict(zip(ServingSettings.model_fields, options.serving)))
    if options.threads:
        torch.set_num_threads(options.threads)
        module.os.sched_getaffinity = lambda _: range(options.threads)  # a shared machine has no cores to itself
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    chance, errors, started = random.Random(0), {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = str(model_folder(options.model, Path(folder), dtype))
        latency = measured_latency(path, dtype, serving)
        table_s, dense = time.perf_counter() - started, on_device(load_model(path, dtype))
        print(latency.model_dump_json(exclude={"provenance"}), flush=True)
        for index in range(options.candidates):
            model, kind = copy.deepcopy(dense), ("structured", "unstructured", "both")[index % 3]
            thin(model, chance, kind)
            expected = predicted(latency, model) / latency.dense_ms
            sparsify_for_inference(model, num_tokens=serving.tokens_at_once)
            runs = [speeds([dense, model], **serving.model_dump()) for _ in range(options.runs)]
            found = statistics.median(other.batch_ms(serving) / one.batch_ms(serving) for one, other in runs)
            errors.setdefault(kind, []).append(expected / found - 1)
            print(f"{kind}: predicted {expected:.3f} of dense, measured {found:.3f}, {errors[kind][-1]:+.1%}", flush=True)
    print(json.dumps({
        "benchmark": "predicted_latency", "model": options.model, "serving": list(serving.model_dump().values()),
        "dense_ms": latency.dense_ms, "table_s": round(table_s, 1), "num_candidates": options.candidates,
        "median_error": {kind: round(statistics.median(map(abs, each)), 4) for kind, each in errors.items()},
        "largest_error": {kind: round(max(map(abs, each)), 4) for kind, each in errors.items()},
        "device": device_name(str(dense.device)), "date": str(date.today())}))


if __name__ == "__main__":
    main()
