"""Structured pruning: quality at equal bytes and at equal time, and the speed of what is deployed.

    python benchmarks/structured.py run OUT [--root ../shared] [--part 0/1] [--limit-s 600] [--speed]  # quality, books-30m
    python benchmarks/structured.py table OUT [OUT ...]
    python benchmarks/structured.py speed OUT.jsonl       # 124 and 950 M on a GPU; --cpu: books-30m

`run` prunes and fine-tunes as benchmarks/methods.py does, whose files and tables these are; with --speed, which wants a card of
its own, the candidates of the first data seed are also timed, compact and through the dispatcher, beside the dense model. Half
of the neurons, half of the heads and two of eight layers, each with and without 2/3 KL, stand beside single weights of equal
bytes (bitmap form), and beside a row of sparsities of single weights among which the one of equal time is found. `speed` times
random models, whose speed is that of trained ones, and makes no folder. Each line of OUT.jsonl is one model beside its dense
one.
"""

import argparse
import copy
import functools
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import methods
import torch
from methods import SEEDS, Case, control, trained
from transformers import GPT2Config, GPT2LMHeadModel

from raysearch.deploy.load import OWN_FILE, load
from raysearch.evaluation.speed import NUM_ROUNDS, speeds
from raysearch.kernels.device import device_name
from raysearch.kernels.dispatch import time_in_turn
from raysearch.models.compact import compact
from raysearch.models.model import load_model
from raysearch.models.sparse import linear_layers, sparsify_for_inference
from raysearch.models.weights import to_store, write_weights
from raysearch.study.files import file_sha256
from raysearch.training.presets import PRESETS
from raysearch.trial.worker import Worker

STEPS = 120
KL = 2 / 3
BATCH, PROMPT, NEW = 16, 480, 32
"""What a candidate of books-30m is timed with."""
SHAPES = {"gpt2-small": (16, 960, 32), "gpt-efficio-950m": (16, 960, 32), "books-30m": (BATCH, PROMPT, NEW)}
LAYERS, WIDTH = 8, 512
PRUNABLE = LAYERS * 12 * WIDTH**2
REMOVED = {  # parameters that the compact form is without, biases and norms too
    "half of the neurons": LAYERS * (4 * WIDTH**2 + 2 * WIDTH),
    "half of the heads": LAYERS * (2 * WIDTH**2 + 3 * WIDTH // 2),
    "2 of 8 layers": 2 * (12 * WIDTH**2 + 13 * WIDTH),
}


def structured() -> Iterator[Case]:
    units = {"half of the neurons": {"pattern": "neuron", "scope": "layer", "uniform": True, "target_sparsity": 0.5},
             "half of the heads": {"pattern": "head", "scope": "layer", "uniform": True, "target_sparsity": 0.5},
             "2 of 8 layers": {"pattern": "layer", "target_sparsity": 0.25}}
    criteria = {"half of the neurons": ("taylor", "l2"), "half of the heads": ("taylor", "l2"),
                "2 of 8 layers": ("contribution", "top")}
    for seed in SEEDS:
        yield f"dense control, {STEPS} steps", control(STEPS), seed
        for loss, alpha in (("CE", 0.0), ("2/3 KL", KL)):
            for name, fields in units.items():
                yield (f"{name}, {criteria[name][0]}, {loss}, {STEPS} steps",
                       trained(STEPS, **fields, criterion=criteria[name][0], distill_alpha=alpha), seed)
                # 2 bytes a weight: P / 8 + 2 P (1 - s) = 2 (P - R)
                sparsity = round(REMOVED[name] / PRUNABLE + 1 / 16, 4)
                yield (f"single weights of equal bytes: {name}, {loss}, {STEPS} steps",
                       trained(STEPS, target_sparsity=sparsity, distill_alpha=alpha), seed)
        for name, fields in units.items():
            yield (f"{name}, {criteria[name][1]}, CE, {STEPS} steps",
                   trained(STEPS, **fields, criterion=criteria[name][1]), seed)
        for name in ("half of the heads", "half of the neurons"):
            yield (f"{name}, l0, CE, {STEPS} steps",
                   trained(STEPS, **units[name], criterion="l0", score_rate=0.1, gate_penalty=1.0), seed)
        for sparsity in (0.7, 0.8, 0.9, 0.95):
            for loss, alpha in (("CE", 0.0), ("2/3 KL", KL)):
                yield (f"single weights, {sparsity}, {loss}, {STEPS} steps",
                       trained(STEPS, target_sparsity=sparsity, distill_alpha=alpha), seed)


def timed(worker: Worker, name: str, seed: int) -> dict[str, Any]:
    """Of the first seed's candidates: as they are served, beside the dense model. A loss changes no shape."""
    if seed != SEEDS[0] or "KL" in name:
        return {}
    path = worker.study.model.path
    dense = load_model(path, worker.engine.model.dtype).to(worker.engine.device)
    served = copy.deepcopy(dense)
    with torch.no_grad():
        for name, parameter in served.named_parameters():
            parameter.copy_(worker.engine.gather(name).view_as(parameter))
    line = beside(dense, served, (BATCH, PROMPT, NEW), is_sparse=True)
    gc.collect()  # of the graphs
    return {"speed": line, "parameters": sum(parameter.numel() for parameter in served.parameters())}


def beside(dense: Any, served: Any, shape: tuple[int, int, int], is_sparse: bool = False) -> dict[str, Any]:
    """Cuts the dead parts out of `served`, in place, or runs it through the dispatcher, and times both models."""
    batch, prompt, new = shape
    started = time.perf_counter()
    how: dict[str, Any] = {}
    if is_sparse:
        done = sparsify_for_inference(served, num_tokens=[batch * prompt, batch])
        removed = done.compaction.num_parameters
        how = {"whole_forward": done.model_ratio, "sparse_layers": {
            tokens: sum(layer.choices[tokens].backend != "dense" for layer in done.layers) for tokens in done.model_ratio}}
    else:
        removed = compact(served).num_parameters
    prepared_s = time.perf_counter() - started
    one, other = speeds([dense, served], batch, prompt, new)
    if not is_sparse:
        how = {"stock_scoring_tokens_per_s": stock_scoring([dense, served], batch, prompt)}
    return {"dense": one.model_dump(), "served": other.model_dump(), "decode_ratio": one.decode_ms / other.decode_ms,
            "scoring_ratio": other.scoring_tokens_per_s / one.scoring_tokens_per_s, "batch": batch, "prompt": prompt,
            "new": new, "prepared_s": round(prepared_s, 1), "removed": removed, **how}


@torch.no_grad()
def stock_scoring(models: list[Any], batch: int, prompt: int) -> list[float]:
    """Tokens per second of each by transformers' own forward, which is what a deployer's stock loader gives, in turn."""
    tokens = torch.ones(batch, prompt, dtype=torch.long, device=models[0].device)
    runs = [functools.partial(model, input_ids=tokens, use_cache=False, logits_to_keep=1) for model in models]
    times_us = time_in_turn(runs, models[0].device, NUM_ROUNDS, as_graphs=False)
    return [batch * prompt / statistics.median(column) * 1e6 for column in times_us]


# ---- speed of random models ----


@torch.no_grad()
def drop_neurons(model: Any, share: float) -> None:
    for block in model.transformer.h:
        width = block.mlp.c_proj.weight.shape[0]
        block.mlp.c_proj.weight[torch.randperm(width, device=model.device)[:round(share * width)]] = 0


@torch.no_grad()
def drop_heads(model: Any, share: float) -> None:
    for block in model.transformer.h:
        num_heads = block.attn.num_heads
        gone = torch.randperm(num_heads, device=model.device)[:round(share * num_heads)]
        block.attn.c_proj.weight.view(num_heads, -1, block.attn.c_proj.weight.shape[1])[gone] = 0


@torch.no_grad()
def drop_layers(model: Any, share: float) -> None:
    blocks = model.transformer.h
    for block in blocks[len(blocks) - round(share * len(blocks)):]:
        for part in (block.attn.c_proj, block.mlp.c_proj):
            part.weight.zero_()
            part.bias.zero_()


@torch.no_grad()
def mask_weights(model: Any, pattern: str) -> None:
    for *_, layer in linear_layers(model):
        rows = layer.weight.T  # [outputs, inputs] of a Conv1D
        if pattern[0] == "0":
            mask = torch.rand(rows.shape, device=rows.device) >= float(pattern)
        elif pattern == "2:4":
            order = torch.rand(rows.shape[0], rows.shape[1] // 4, 4, device=rows.device).argsort(dim=-1)
            mask = (order < 2).view(rows.shape)
        else:
            blocks = torch.rand(-(-rows.shape[0] // 64), -(-rows.shape[1] // 64), device=rows.device) >= 0.9
            mask = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)[:rows.shape[0], :rows.shape[1]]
        layer.weight.copy_((rows * mask).T)


def exported(model: Any) -> Any:
    """As a compressed export comes back from `raysearch.load`."""
    matrices = {f"{name}.weight" for name, *_ in linear_layers(model)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.config.save_pretrained(folder)
        write_weights(folder / OWN_FILE, {name: to_store(parameter, parameter != 0 if name in matrices else None)
                                            for name, parameter in model.named_parameters()})
        (folder / "raysearch.json").write_text(json.dumps({"sha256": {OWN_FILE: file_sha256(folder / OWN_FILE)}}))
        return load(folder).to(model.device)


def random_gpt2(config: GPT2Config, device: str) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return GPT2LMHeadModel(config).to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


Measured = Callable[[], dict[str, Any]]


def cases(name: str, shape: tuple[int, int, int], device: str) -> Iterator[tuple[str, float | None, Measured]]:
    """(what was removed, how many times as fast scoring must be, the measurement)."""
    dense = random_gpt2(PRESETS[name].config(), device)

    def without(*drops: tuple[Callable[[Any, Any], None], Any], is_sparse: bool = False) -> dict[str, Any]:
        served = copy.deepcopy(dense)
        for drop, argument in drops:
            drop(served, argument)
        return beside(dense, exported(served) if is_sparse else served, shape, is_sparse)

    def ordinary() -> dict[str, Any]:
        config = PRESETS[name].config()
        config.n_layer -= round(config.n_layer / 4)
        return beside(dense, random_gpt2(config, device), shape)

    yield "half of the neurons", 1.3, lambda: without((drop_neurons, 0.5))
    must = 1.6 if name == "gpt-efficio-950m" else None
    yield "half of the neurons and of the heads", must, lambda: without((drop_neurons, 0.5), (drop_heads, 0.5))
    yield "a quarter of the layers", None, lambda: without((drop_layers, 0.25))
    yield "an ordinary model of three quarters of the layers", None, ordinary
    if name != "gpt-efficio-950m":  # packing 850 M weights takes a minute of the host
        yield "2:4, exported and loaded", 1.0, lambda: without((mask_weights, "2:4"), is_sparse=True)
        yield "90 % in blocks of 64, exported and loaded", 1.0, lambda: without((mask_weights, "block"), is_sparse=True)
    for sparsity in ("0.5", "0.7", "0.8", "0.9", "0.95") if name == "books-30m" else ():
        yield (f"single weights, {sparsity}, exported and loaded", 1.0,
               functools.partial(without, (mask_weights, sparsity), is_sparse=True))


def speed(options: argparse.Namespace) -> None:
    device, started = "cpu" if options.cpu else "cuda", time.perf_counter()
    header = {"date": date.today().isoformat(), "device": device_name(device), "torch": torch.__version__}
    for name, shape in {"books-30m": (options.cpu_batch, 480, 32)}.items() if options.cpu else SHAPES.items():
        for what, must, measure in cases(name, shape, device):
            row: dict[str, Any] = {"model": name, "case": what, "must": must}
            try:
                row |= measure()
            except Exception as error:  # the other cases are worth their GPU time
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            gc.collect()
            with open(options.out, "a") as file:
                file.write(json.dumps({**header, **row}) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "structured speed", "seconds": round(time.perf_counter() - started, 1)}))


def speed_table(files: list[Path]) -> None:
    print("| model | case | tokens | scoring, tokens/s: dense | served | ratio | must | stock loader: dense | served | ratio "
          "| decode ms: dense | served | ratio | resident MB: dense | served |\n" + "|---" * 15 + "|")
    for row in (json.loads(text) for file in files for text in file.read_text().splitlines()):
        row |= row.get("speed", {})
        name = row.get("model", "books-30m")
        if "error" in row or "served" not in row:
            if "error" in row:
                print(f"| {name} | {row['case']} | failed: {row['error']} |" + " |" * 12)
            continue
        one, other = row["dense"], row["served"]
        stock = row.get("stock_scoring_tokens_per_s")
        print(f"| {name} | {row['case']} | {row['batch']} x {row['prompt']} + {row['new']} "
              f"| {one['scoring_tokens_per_s']:,.0f} | {other['scoring_tokens_per_s']:,.0f} | {row['scoring_ratio']:.2f} "
              f"| {row.get('must') or ''} "
              + (f"| {stock[0]:,.0f} | {stock[1]:,.0f} | {stock[1] / stock[0]:.2f} " if stock else "| | | ") +
              f"| {one['decode_ms']:.3f} | {other['decode_ms']:.3f} | {row['decode_ratio']:.2f} "
              f"| {one['resident_bytes'] / 1e6:,.1f} | {other['resident_bytes'] / 1e6:,.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    groups = {"structured": structured}
    running = commands.add_parser("run")
    methods.add_arguments(running, groups, 600.0)
    running.add_argument("--speed", action="store_true")
    commands.add_parser("table").add_argument("out", type=Path, nargs="+")
    timing = commands.add_parser("speed")
    timing.add_argument("out", type=Path)
    timing.add_argument("--cpu", action="store_true")
    timing.add_argument("--cpu-batch", type=int, default=1)
    options = parser.parse_args()
    if getattr(options, "cpu", False):
        os.environ["DS_ACCELERATOR"] = "cpu"
    if options.command == "run":
        methods.run(options, groups, *[timed] * options.speed)
    elif options.command == "speed":
        speed(options)
    else:
        folders = [path for path in options.out if path.is_dir()]
        if folders:
            methods.table(argparse.Namespace(out=folders))
            print()
        speed_table([folder / "cases.jsonl" for folder in folders] + [path for path in options.out if path.is_file()])


if __name__ == "__main__":
    main()
