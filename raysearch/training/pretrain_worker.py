"""What a worker of pretraining runs: the engine from the last checkpoint on, checkpoints, the held-out loss, the model's files.

Ray Train starts it on each rank (pretrain.py); what it needs to know is in `job`, what it measured in files of the work folder.
"""

import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from raysearch.cluster.joining import use_rays_network
from raysearch.cluster.placement import USABLE, MicroBatch, largest_micro_batch
from raysearch.config import study_of
from raysearch.models.model import ModelSize, size_of
from raysearch.models.weights import saving
from raysearch.study.files import new_directory, write_json
from raysearch.training.data import Blocks
from raysearch.training.engine import Engine
from raysearch.training.finetune import train
from raysearch.training.hardware import can_compile, memory_bytes
from raysearch.training.learning_rate import learning_rate_at
from raysearch.training.presets import Preset

PROGRESS_S = 5.0
MAX_WARMUP_STEPS = 100
MAX_EVAL_BLOCKS = 1024  # of the report split, evenly spaced: enough for a standard error below 0.01 nats
EVAL_SEQUENCES = 16


def train_loop(job: dict[str, Any]) -> None:
    """What every Ray Train worker runs: train from the last checkpoint on, checkpoint, validate, write the model."""
    work, shape, blocks, num_steps = job["work"], job["shape"], job["blocks"], job["num_steps"]
    use_rays_network()
    if job["dtype"] == "float32":
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(job["num_threads"])
    random_model = _random_model(work / "random", shape, job["seed"])
    engine = Engine(str(random_model), prunable="matrices", zero_stage=job["zero_stage"], dtype=job["dtype"],
                    batch_tokens=job["batch_tokens"], context_tokens=shape.context_tokens, weight_decay=shape.weight_decay,
                    micro_batch=planned(shape, job, dist.get_world_size())[1], compiled=can_compile())
    first_step = load_checkpoint(engine)
    clock = _Clock(engine, work / "progress.json", job["batch_tokens"], first_step, num_steps,
                   job["checkpoint_every_s"])
    num_warmup = min(MAX_WARMUP_STEPS, num_steps // 10)

    def after_step(num_done: int, loss: torch.Tensor) -> None:
        if clock.tick(num_done, loss) and num_done < num_steps:
            save_checkpoint(engine, num_done)

    try:
        train(engine, blocks["train"], range(first_step, num_steps),
              lambda step: learning_rate_at(step, num_steps, shape.learning_rate, num_warmup), after_step, seed=job["seed"])
    except FloatingPointError as error:  # on all ranks at once; raising would make Ray Train try it all again
        if engine.rank == 0:
            write_json(work / "measured.json", {"failure": str(error)})
        return
    train_s = time.monotonic() - clock.started
    validation_loss = held_out_loss(engine, blocks["report"])
    _write_model(engine, work / "model", getattr(torch, job["dtype"]))
    if engine.rank == 0:
        write_json(work / "measured.json", {
            "validation_loss": validation_loss, "train_s": train_s, "device": str(engine.device),
            "num_parameters": sum(math.prod(shape) for shape in engine.shapes.values())})


def _random_model(folder: Path, shape: Preset, seed: int) -> Path:
    """GPT-2's own initialisation, in fp32; a file, because ZeRO-3 initialises wrongly when it partitions meanwhile."""
    if dist.get_rank() == 0 and not folder.is_dir():
        torch.manual_seed(seed)
        with new_directory(folder) as aside, saving(folder):
            GPT2LMHeadModel(shape.config()).save_pretrained(aside)
    dist.barrier()
    return folder


class _Clock:
    """Every PROGRESS_S or so, on the same step on all ranks: progress, divergence, time for a checkpoint."""

    def __init__(self, engine: Engine, file: Path, tokens_per_step: int, step: int, num_steps: int,
                 checkpoint_every_s: float) -> None:
        self.engine, self.file, self.tokens_per_step, self.num_steps = engine, file, tokens_per_step, num_steps
        self.checkpoint_every_s = checkpoint_every_s
        # rank 0's clock alone: another one would put the ranks' collective ticks on different steps
        self.started = self.last_time = self.last_checkpoint = engine.from_rank_0(time.monotonic)
        self.last_step, self.next_step = step, step + 1

    def tick(self, step: int, loss: torch.Tensor) -> bool:
        """True when it is time for a checkpoint; FloatingPointError on all ranks when the loss is not finite."""
        if step < self.next_step and step < self.num_steps:
            return False
        mean_loss = self.engine.mean(loss)
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"the loss became {mean_loss} by step {step}; lower the learning rate")
        now = self.engine.from_rank_0(time.monotonic)
        step_s = (now - self.last_time) / (step - self.last_step)
        if self.engine.rank == 0:
            write_json(self.file, {"step": step, "loss": mean_loss, "tokens_per_step": self.tokens_per_step,
                                   "tokens_per_s": self.tokens_per_step / step_s})
        self.last_time, self.last_step, self.next_step = now, step, step + max(1, round(PROGRESS_S / step_s))
        if now - self.last_checkpoint < self.checkpoint_every_s:
            return False
        self.last_checkpoint = now
        return True


@torch.no_grad()
def held_out_loss(engine: Engine, blocks: Blocks) -> float:
    """Nats per token; every rank scores the same blocks, so ZeRO-3's gathers stay in step."""
    engine.model.eval()
    indices = eval_indices(blocks)
    total = 0.0
    for chunk in np.array_split(indices, math.ceil(len(indices) / EVAL_SEQUENCES)):
        tokens = blocks.batch(chunk).to(engine.device)
        total += float(engine.model(input_ids=tokens, labels=tokens).loss) * len(chunk)
    return total / len(indices)


def eval_indices(blocks: Blocks) -> np.ndarray:
    num_blocks = len(blocks.tokens)
    return np.unique(np.linspace(0, num_blocks - 1, min(num_blocks, MAX_EVAL_BLOCKS)).round().astype(np.int64))


def save_checkpoint(engine: Engine, step: int) -> None:
    """Every rank hands in its own files, of what it draws too; Ray Train joins them into one folder."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, step)
        drawn = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if engine.device.type == "cuda" else [])]
        torch.save(drawn, Path(folder) / f"drawn-{engine.rank}.pt")
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def load_checkpoint(engine: Engine) -> int:
    """The number of steps done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        step = engine.load_checkpoint(folder)
        for state, restore in zip(torch.load(Path(folder) / f"drawn-{engine.rank}.pt"),
                                  (torch.set_rng_state, torch.cuda.set_rng_state)):
            restore(state)
        return step


def _write_model(engine: Engine, folder: Path, dtype: torch.dtype) -> None:
    """The fp32 masters, whole, as a Hugging Face folder in the training's dtype; written by rank 0."""
    weights = {}
    for name in engine.shapes:
        whole = engine.gather(name)  # collective
        if engine.rank == 0:
            weights[name] = whole.to("cpu", dtype)

    def write() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        model = AutoModelForCausalLM.from_config(engine.model.config, dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        with new_directory(folder) as aside, saving(folder):
            model.save_pretrained(aside)

    engine.from_rank_0(write)


def planned(shape: Preset, job: dict[str, Any], num_workers: int) -> tuple[ModelSize, MicroBatch]:
    """(the model's size, what a worker has in memory at a time); as if it were on a machine like this one."""
    size, is_gpu = size_of(shape.config()), job["dtype"] == "bfloat16"
    study = study_of(path="", dtype=job["dtype"], batch_tokens=job["batch_tokens"], context_tokens=shape.context_tokens)
    return size, largest_micro_batch(size, study, num_workers, job["zero_stage"],
                                     USABLE * memory_bytes() / (1 if is_gpu else num_workers))
