"""Dense baselines: a GPT-2 trained from nothing with Ray Train and DeepSpeed, saved as a plain Hugging Face folder.

The driver packs the corpus; Ray Train's workers (pretrain_worker.py) train random weights, checkpoint and come back after
a kill; rank 0 writes the model aside, and the driver moves it to its place. All state lies in a working folder beside the
result, named by a hash of the settings: the same call goes on where the last was killed.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import PreTrainedTokenizerFast

from raysearch.cluster.joining import connect_ray
from raysearch.cluster.placement import rank_bytes
from raysearch.kernels.device import device_name
from raysearch.study.files import file_sha256, new_directory, write_json
from raysearch.study.provenance import provenance
from raysearch.study.records import hash_json
from raysearch.study.storage import AnyPath, StorePath, location
from raysearch.training.corpus import load_documents
from raysearch.training.data import Blocks, pack, split_documents, train_tokenizer
from raysearch.training.presets import PRESETS, Preset
from raysearch.training.pretrain_worker import PROGRESS_S, eval_indices, planned, train_loop
from raysearch.training.texts import Texts
from raysearch.units import human_bytes

RECORD = "raysearch.json"
SEED = 0
"""Of the random weights and the order of the text."""


@dataclass(frozen=True)
class PretrainResult:
    """The model folder and what its training measured."""

    path: Path
    num_parameters: int
    num_steps: int
    validation_loss: float
    """Nats per token on the held-out report split."""
    unigram_loss: float
    """Nats per token of the train split's token frequencies on the same tokens."""
    train_s: float
    """Seconds in optimizer steps, of the last start."""
    total_s: float
    """Seconds of the whole call; both are those of the call that trained, when the folder was there already."""


def pretrain(preset: str, corpus: str, out: Path, *, text_field: str = "text", steps: int | None = None, num_workers: int = 1,
             zero_stage: int = 0, checkpoint_every_s: float = 60.0, echo: Callable[[str], None] = print) -> PretrainResult:
    """Trains the preset on the corpus and writes the Hugging Face folder `out`, in fp32 on CPUs and bf16 on GPUs.

    A folder that the same settings made is returned as it is; an unfinished run of the same settings goes on from its
    last checkpoint. Raises ValueError of one sentence for bad input and for a loss that became NaN, RuntimeError when workers
    died too often.
    """
    started = time.monotonic()
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    shape = PRESETS[preset]
    num_steps = shape.num_steps if steps is None else steps
    batch_tokens = shape.batch_tokens
    if num_steps < 1:
        raise ValueError(f"steps must be at least 1, got {num_steps}")
    if num_workers < 1 or batch_tokens % (num_workers * shape.context_tokens):
        raise ValueError(f"num_workers must divide the {batch_tokens // shape.context_tokens} sequences of a batch, "
                         f"got {num_workers}")
    out = location(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a directory with --out")
    documents = split_documents(load_documents(corpus, text_field, echo))
    if any(part.holds_chats for part in documents.values()):
        raise ValueError(f"corpus {corpus}: holds chats, which need a tokenizer with a chat template, and pretraining makes "
                         "its own; give plain text, or fine-tune a model that has one")
    settings = {**asdict(shape), "preset": preset, "num_steps": num_steps, "batch_tokens": batch_tokens, "seed": SEED,
                "corpus_fingerprint": _fingerprint(documents)}
    del settings["note"]
    if (done := _finished(out, settings)) is not None:
        echo(f"{out} holds this model already")
        return done
    resources = _resources(num_workers)
    work = out.parent / f".{out.name}.pretrain-{hash_json([settings, num_workers, zero_stage, resources])[:8]}"
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer").is_dir():
        with new_directory(work / "tokenizer") as aside:
            train_tokenizer(documents["train"], shape.vocab_size).save_pretrained(aside)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    blocks = {split: pack(documents[split], tokenizer, shape.context_tokens, split, say=echo) for split in ("train", "report")}
    del documents  # training takes long, and its workers' memory is needed
    echo(f"{preset}: {shape.note}; {blocks['train'].num_tokens:,} tokens of training text, "
         f"{num_steps:,} steps of {batch_tokens:,} tokens")
    job = {"work": work, "blocks": blocks, "num_steps": num_steps, "batch_tokens": batch_tokens, "seed": SEED,
           "zero_stage": zero_stage, "dtype": "bfloat16" if resources.get("GPU") else "float32", "shape": shape,
           "checkpoint_every_s": checkpoint_every_s, "num_threads": int(resources["CPU"])}
    echo(memory_needed(shape, job, num_workers))
    for name in ("progress.json", "measured.json"):
        (work / name).unlink(missing_ok=True)
    try:
        fit(train_loop, job, num_workers, resources, work / "ray", _follower(work / "progress.json", num_steps, echo))
    except (KeyboardInterrupt, SystemExit):
        echo("stopped by a signal; the same command goes on from the last checkpoint")
        raise
    measured = json.loads((work / "measured.json").read_text())
    if "failure" in measured:
        raise ValueError(f"pretraining failed: {measured['failure']}")
    unigram = unigram_loss(blocks["train"], blocks["report"], shape.vocab_size)
    total_s = time.monotonic() - started
    with new_directory(out) as aside:
        shutil.copytree(work / "model", aside, dirs_exist_ok=True)
        tokenizer.save_pretrained(aside)
        model_sha256 = {file.name: file_sha256(file) for file in sorted(aside.glob("*.safetensors"))}
        write_json(aside / RECORD, {
            "kind": "pretrain", "settings": settings, "corpus": corpus, "num_workers": num_workers,
            "zero_stage": zero_stage, "num_parameters": measured["num_parameters"],
            "validation_loss_nats_per_token": measured["validation_loss"], "unigram_loss_nats_per_token": unigram,
            "train_s": round(measured["train_s"], 2), "total_s": round(total_s, 2), "sha256": model_sha256,
            "provenance": provenance(device_name(measured["device"])).model_dump(mode="json"),
        })
    shutil.rmtree(work, ignore_errors=True)
    done = _finished(out, settings)
    assert done is not None
    echo(f"validation loss {done.validation_loss:.3f} nats/token (unigram {unigram:.3f}), {done.num_parameters:,} "
         f"parameters, {done.train_s:.0f} s of training, {done.total_s:.0f} s in total: {out}")
    return done


def _fingerprint(documents: Mapping[str, Texts]) -> str:
    """`hash_json` of the documents as lists, of which one is in memory at a time."""
    digest = hashlib.sha256()
    for opening, split in zip("{,,", sorted(documents), strict=True):
        digest.update(f'{opening}"{split}":['.encode())
        for index, text in enumerate(documents[split]):
            digest.update(("," * (index > 0) + json.dumps(text)).encode())
        digest.update(b"]")
    digest.update(b"}")
    return digest.hexdigest()[:16]


def memory_needed(shape: Preset, job: dict[str, Any], num_workers: int) -> str:
    """One line: what placement.py counts for a rank, and what there is where ranks run on this machine's processors."""
    size, micro_batch = planned(shape, job, num_workers)
    total = sum(rank_bytes(size, num_ranks=num_workers, zero_stage=job["zero_stage"], dtype=job["dtype"],
                           micro_batch=micro_batch).values())
    line = f"each of {num_workers} ranks needs about {human_bytes(total)} of memory, {micro_batch.tokens} tokens at a time"
    free = psutil.virtual_memory().available
    if job["dtype"] == "bfloat16":
        return f"{line}, on its GPU"
    more = "; that is MORE than there is: use a smaller preset, or more machines" if num_workers * total > free else ""
    return f"{line}, and {human_bytes(free)} are free here{more}"


def unigram_loss(train: Blocks, held_out: Blocks, vocab_size: int) -> float:
    """Nats per token of the train split's token frequencies (one added to each) on the held-out targets."""
    counts = np.bincount(train.tokens.reshape(-1), minlength=vocab_size) + 1.0
    log_frequencies = np.log(counts / counts.sum())
    return float(-log_frequencies[held_out.tokens[eval_indices(held_out), 1:]].mean())


def _finished(out: Path, settings: dict[str, Any]) -> PretrainResult | None:
    """The result in `out` if these settings made it, None if `out` is free; ValueError if it holds something else."""
    if not out.is_dir() or not any(out.iterdir()):
        return None
    try:
        record = json.loads((out / RECORD).read_text())
        before = record["settings"]
    except (OSError, ValueError, KeyError):
        names = sorted(path.name for path in out.iterdir())
        raise ValueError(f"{out}: holds something else ({', '.join(names[:3])}); give a new or empty directory with "
                         "--out") from None
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        raise ValueError(f"{out}: holds a model made with other settings ({', '.join(changed)}); give a new directory "
                         "with --out")
    for name, sha256 in record["sha256"].items():
        if not (out / name).is_file() or file_sha256(out / name) != sha256:
            raise ValueError(f"{out}: {name} is not the file that was written; remove the folder to train again")
    return PretrainResult(out, record["num_parameters"], before["num_steps"], record["validation_loss_nats_per_token"],
                          record["unigram_loss_nats_per_token"], record["train_s"], record["total_s"])


def _resources(num_workers: int) -> dict[str, float]:
    """What each worker gets of the cluster: a GPU if there is one for each, and its share of the cores if not."""
    connect_ray()
    have = ray.cluster_resources()
    if have.get("GPU", 0) >= num_workers:
        return {"CPU": 1, "GPU": 1}
    if have.get("CPU", 0) < num_workers:
        raise ValueError(f"num_workers must be at most the cluster's {have.get('CPU', 0):g} cores, got {num_workers}")
    largest_node = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return {"CPU": max(1, int(min(have["CPU"] // num_workers, largest_node)))}


def fit(loop: Callable[[dict[str, Any]], None], job: dict[str, Any], num_workers: int, resources: dict[str, float],
        place: AnyPath, look: Callable[[], object] = lambda: None) -> None:
    """Runs `loop(job)` on so many workers with these resources each. They are started again where one died, up to three times,
    and find the last checkpoint in `place`, there or in a later call; then RuntimeError of one sentence. Meanwhile, and at the
    end, it takes a `look`."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a job's relative paths are those of this process
    has_gpu = bool(resources.get("GPU"))
    trainer = TorchTrainer(
        loop,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if has_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers, use_gpu=has_gpu, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            name="run",  # the same name and place: Ray Train goes on from the last checkpoint that it finds there
            storage_path=place.path if isinstance(place, StorePath) else str(place),
            storage_filesystem=place.filesystem if isinstance(place, StorePath) else None,
            failure_config=ray.train.FailureConfig(max_failures=3, controller_failure_limit=1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            # a thread that waits must sleep: spinning ones made a busy machine 10 times slower (2026-11-23, 2 cores)
            worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what ends it is one sentence of ours
    try:
        done = ThreadPoolExecutor(1).submit(trainer.fit)  # in the main thread Ray Train takes Ctrl-C for itself
        while wait([done], PROGRESS_S / 4).not_done:
            look()
        look()
        done.result()
    except ray.train.TrainingFailedError as error:
        causes = [str(cause).strip().splitlines()[-1] for cause in getattr(error, "worker_failures", {}).values()]
        reason = "; ".join(dict.fromkeys(causes)) or str(error).strip().splitlines()[0]
        if "memory" in str(error) or "died unexpectedly" in str(error):
            reason = f"a rank was killed, as one is that needs more memory than there is ({reason})"
        raise RuntimeError(f"training failed: {reason}") from error


def _follower(file: Path, num_steps: int, echo: Callable[[str], None]) -> Callable[[], None]:
    """Prints a line where rank 0 has written new progress since the last call."""
    last_step = 0

    def look() -> None:
        nonlocal last_step
        if file.is_file() and (now := json.loads(file.read_text()))["step"] != last_step:
            last_step = now["step"]
            left_s = (num_steps - last_step) * now["tokens_per_step"] / now["tokens_per_s"]
            left = f"{left_s:,.0f} s" if left_s < 7200 else f"{left_s / 3600:.1f} hours"
            echo(f"step {last_step:,}/{num_steps:,}  loss {now['loss']:.3f}  {now['tokens_per_s']:,.0f} tokens/s  {left} left")

    return look
