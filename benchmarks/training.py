"""Tokens per second of the engine against the loops that people write by hand, in turn in one process run.

    python benchmarks/training.py [--models 30m,124m,950m] [--batches 16384,65536] [--ways engine0,compiled,eager]
    torchrun --nproc_per_node=2 benchmarks/training.py --ways engine0,engine1,engine2,engine3,ddp,fsdp,hf1 --models 124m

GPT-2 shapes with random weights, bf16, fused AdamW, gradients clipped. `eager` and `compiled` are the Hugging Face model in
fp32 under autocast, on all of a rank's tokens at once; `micro` is `compiled` on MICRO_TOKENS at a time; `ddp` and `fsdp`
(FSDP2, bf16 parameters, compiled blocks) are `compiled` over ranks. `hfN` is the Hugging Face Trainer with DeepSpeed at ZeRO
stage N, as its documentation shows. `engineN` is ours at stage N, with micro-batches as placement.py plans them. Needs GPUs.
One JSON line; each row also goes to stderr as soon as it is measured.
"""

import argparse
import datetime
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from raysearch.cluster.placement import USABLE, largest_micro_batch, rank_bytes
from raysearch.config import study_of
from raysearch.models.model import model_size
from raysearch.training.engine import CLIP_NORM, Engine
from raysearch.training.hardware import memory_bytes

SHAPES = {"30m": (8, 512, 8, 512, 8192), "124m": (12, 768, 12, 1024, 50_257), "950m": (26, 1664, 26, 1024, 50_257)}
"""Layers, width, heads, context, vocabulary."""
LEARNING_RATE = 1e-4
MICRO_TOKENS = 16_384
Step = Callable[[], Any]


def config(name: str) -> GPT2Config:
    layers, width, heads, context, vocab = SHAPES[name]
    return GPT2Config(vocab_size=vocab, n_positions=context, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0,
                      embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)


def flops_per_token(name: str, num_parameters: int) -> float:
    """Of forward and backward, with causal attention (Chowdhery et al. 2022, appendix B, halved)."""
    layers, width, _, context, _ = SHAPES[name]
    return 6 * num_parameters + 6 * layers * width * context


class WithLoss(nn.Module):
    """The loss inside the module, where DDP's hooks and the compiler see all of it."""

    def __init__(self, model: GPT2LMHeadModel, cross_entropy: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.cross_entropy = model, cross_entropy

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.model.lm_head(self.model.transformer(input_ids=tokens).last_hidden_state[:, :-1])
        return self.cross_entropy(logits, tokens)


def next_token_cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def by_hand(name: str, way: str, tokens: Tensor) -> Step:
    model, cross_entropy = GPT2LMHeadModel(config(name)).cuda().train(), next_token_cross_entropy
    if way == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.transformer.h:
            block.compile()
            fully_shard(block, mp_policy=policy)
        cross_entropy = torch.compile(cross_entropy)
    whole: Any = WithLoss(model, cross_entropy)
    if way == "fsdp":
        fully_shard(whole, mp_policy=policy)
    if way == "ddp":
        whole = nn.parallel.DistributedDataParallel(whole, device_ids=[torch.cuda.current_device()],
                                                    gradient_as_bucket_view=True)
    loss_of = torch.compile(whole) if way in ("compiled", "micro", "ddp") else whole
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> None:
        parts = tokens.cuda().split(MICRO_TOKENS // tokens.shape[1] if way == "micro" else len(tokens))
        for part in parts:
            with torch.autocast("cuda", torch.bfloat16, enabled=way != "fsdp"):
                loss = loss_of(part) / len(parts)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def trainer(name: str, stage: int, tokens: Tensor, batch_tokens: int, seconds: float) -> dict[str, Any]:
    """The row's numbers: the Trainer owns its loop, so a callback reads the clock after every step."""
    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.synchronize()
            clock.append(time.perf_counter())
            control.should_training_stop = clock[-1] - clock[min(4, len(clock) - 1)] > seconds

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=len(tokens), max_steps=100_000, learning_rate=LEARNING_RATE, bf16=True,
            max_grad_norm=CLIP_NORM, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            deepspeed={"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto",
                       "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"})
        data = [{"input_ids": row, "labels": row} for row in tokens] * dist.get_world_size()
        started = time.perf_counter()
        Trainer(GPT2LMHeadModel(config(name)), settings, train_dataset=data * 16, callbacks=[Clock()]).train()
    took = statistics.median(after - before for before, after in itertools.pairwise(clock[4:]))
    return {"first_step_s": round(clock[0] - started, 1), "tokens_per_s": round(batch_tokens / took)}


def engine(folder: Path, stage: int, batch_tokens: int, micro_tokens: int | str, tokens: Tensor, row: dict[str, Any]) -> Step:
    num_ranks, context_tokens = dist.get_world_size(), tokens.shape[1]
    study = study_of(path=str(folder), dtype="bfloat16", batch_tokens=batch_tokens, context_tokens=context_tokens,
                     micro_batch_tokens=micro_tokens)
    size = model_size(str(folder))
    micro = largest_micro_batch(size, study, num_ranks, stage, USABLE * memory_bytes())
    ours = Engine(str(folder), prunable="matrices", zero_stage=stage, dtype="bfloat16", batch_tokens=batch_tokens,
                  context_tokens=context_tokens, weight_decay=0.0, micro_batch=micro, compiled=True)
    row |= {"micro_batch_tokens": micro.tokens, "predicted_gb": round(sum(rank_bytes(
        size, num_ranks=num_ranks, zero_stage=stage, dtype="bfloat16", micro_batch=micro).values()) / 1e9, 2)}
    compiled_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def step() -> None:
        ours.train_step(tokens, LEARNING_RATE)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled_before, "the step ran eagerly"

    return step


def tokens_per_s(step: Step, batch_tokens: int, seconds: float) -> float:
    """The median over five turns of `seconds` / 5."""
    rates: list[float] = []
    number = 1
    while len(rates) < 5:
        dist.barrier()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(number):
            step()
        torch.cuda.synchronize()
        took = torch.tensor(time.perf_counter() - started, device="cuda")
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        if float(took) < seconds / 5:
            number = max(number + 1, int(number * 1.1 * seconds / 5 / float(took)))
        else:
            rates.append(batch_tokens * number / float(took))
    return statistics.median(rates)


def case(name: str, batch_tokens: int, way: str, folder: Path, seconds: float, micro_tokens: int | str) -> dict[str, Any]:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # what the ways before have not given back: 950 M once counted 17 GB of FSDP2's
    context, vocab = SHAPES[name][3:]
    row: dict[str, Any] = {"model": name, "batch_tokens": batch_tokens, "way": way}
    torch.manual_seed(dist.get_rank())
    tokens = torch.randint(0, vocab, (batch_tokens // context // dist.get_world_size(), context))
    num_parameters = model_size(str(folder / name)).num_parameters
    try:
        if way.startswith("hf"):
            row |= trainer(name, int(way[-1]), tokens, batch_tokens, seconds)
        else:
            step = (engine(folder / name, int(way[-1]), batch_tokens, micro_tokens, tokens, row) if way.startswith("engine")
                    else by_hand(name, way, tokens))
            started = time.perf_counter()
            step()
            torch.cuda.synchronize()
            row["first_step_s"] = round(time.perf_counter() - started, 1)
            row["tokens_per_s"] = round(tokens_per_s(step, batch_tokens, seconds))
        row |= {"peak_gb": round((torch.cuda.max_memory_allocated() - before) / 1e9, 2), "tflops_per_gpu": round(
            row["tokens_per_s"] * flops_per_token(name, num_parameters) / 1e12 / dist.get_world_size(), 1)}
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    if dist.get_rank() == 0:
        print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="30m,124m,950m")
    parser.add_argument("--batches", default="16384,65536")
    parser.add_argument("--ways", default="engine0,compiled,eager")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--micro-tokens", default="auto", type=lambda text: text if text == "auto" else int(text),
                        help="of the engine")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ.setdefault("LOCAL_RANK", "0")))
    alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl", **alone)
    with tempfile.TemporaryDirectory() as own:
        shared = [own]  # save_pretrained writes on rank 0 alone, once there is a process group
        dist.broadcast_object_list(shared)
        folder, rows = Path(shared[0]), []
        for name in options.models.split(","):
            if dist.get_rank() == 0:
                torch.manual_seed(0)
                GPT2LMHeadModel(config(name)).to(torch.bfloat16).save_pretrained(folder / name)
            dist.barrier()
            rows += [case(name, int(batch), way, folder, options.seconds, options.micro_tokens)
                     for batch in options.batches.split(",") for way in options.ways.split(",")]
        dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps({"benchmark": "training", "num_gpus": dist.get_world_size(), "device": torch.cuda.get_device_name(),
                          "torch": torch.__version__, "date": datetime.date.today().isoformat(), "rows": rows}))


if __name__ == "__main__":
    main()
