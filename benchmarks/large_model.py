"""A random Llama shape through two rounds of pruning and fine-tuning, ZeRO-3, with every rank's peak memory and the plan's.

    torchrun --nproc_per_node=2 benchmarks/large_model.py CORPUS TOKENIZER [--shape 7b]     # two GPUs
    torchrun --nproc_per_node=2 benchmarks/large_model.py CORPUS TOKENIZER --shape tiny     # two processes of a CPU

The rounds are those of a gang, without Ray. The model's hidden states are nearly constant, and its head gives the corpus's
frequencies of tokens: a study refuses a model at chance. Prints one JSON line; host memory is the growth of the peak RSS.
"""

import argparse
import datetime
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from raysearch.cluster.placement import rank_bytes
from raysearch.config import TrialConfig, study_of
from raysearch.kernels.device import device_name
from raysearch.models.model import model_size
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import provenance
from raysearch.study.records import StudyRecord
from raysearch.trial.actions import resolve_actions
from raysearch.trial.inputs import read_inputs
from raysearch.trial.round import dense_round, load_candidate, run_round
from raysearch.trial.worker import Worker

SHAPES = {"tiny": (64, 172, 2, 4, 128), "1b": (2048, 5504, 22, 32, 1024), "7b": (4096, 11008, 32, 32, 1024)}
"""Width, MLP width, layers, heads, context."""


@torch.no_grad()
def write_model(folder: Path, shape: str, corpus: Path, tokenizer: Path) -> None:
    width, mlp_width, layers, heads, _ = SHAPES[shape]
    words = AutoTokenizer.from_pretrained(tokenizer)
    tokens = torch.tensor(words(corpus.read_text()[:1_000_000], verbose=False)["input_ids"])
    counts = torch.bincount(tokens, minlength=len(words)).float() + 0.1
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0))
    torch.set_default_dtype(torch.float32)
    model.model.embed_tokens.weight[:, 0] = 30.0
    for block in model.model.layers:
        for last in (block.self_attn.o_proj, block.mlp.down_proj):
            last.weight *= 0.01
            last.weight[0] = 0.0
    log_frequencies = (counts / counts.sum()).log().to(device)  # the last norm makes the first dimension sqrt(width)
    model.lm_head.weight[:, 0] = (log_frequencies / width**0.5).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path, help="folder")
    parser.add_argument("--shape", default="7b", choices=SHAPES)
    parser.add_argument("--num-steps", type=int, default=4, help="of each round")
    options = parser.parse_args()
    num_ranks, rank, context = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), SHAPES[options.shape][-1]
    is_gpu = torch.cuda.is_available()
    folder = Path(tempfile.gettempdir()) / f"raysearch-large-{os.environ['MASTER_PORT']}"
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "study").mkdir(parents=True)
        write_model(folder / "model", options.shape, options.corpus, options.tokenizer)  # before the process group
        (folder / "ready").touch()
    while not (folder / "ready").exists():
        time.sleep(0.2)
    batch_tokens = 8 * num_ranks * context
    study = study_of(
        path=str(folder / "model"), dtype="bfloat16", corpus=str(options.corpus), context_tokens=context, tasks=("text",),
        num_items=16, batch_tokens=batch_tokens, epoch_tokens=options.num_steps * batch_tokens, num_ranks=num_ranks,
        zero_stage=3, gpus_per_rank=float(is_gpu), dense_control=False)
    inputs = read_inputs(study)
    ledger = Ledger(folder / "study")
    if rank == 0:
        ledger.attach(StudyRecord(study=study, space="large_model", space_hash="", root_key=inputs.root_key,
                                  provenance=provenance(device_name("cpu"))))
    moments: dict[str, dict[str, Any]] = {}
    started, host = time.perf_counter(), 0

    def moment(name: str) -> None:
        nonlocal started, host
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        own = {"host_gb": round((peak - host) / 1e9, 2)}
        if is_gpu:
            own["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            torch.cuda.reset_peak_memory_stats()
        found = [None] * num_ranks
        dist.all_gather_object(found, own)
        moments[name] = {"seconds": round(time.perf_counter() - started, 1), "ranks": found}
        if rank == 0:
            print(name, moments[name], file=sys.stderr, flush=True)
        started, host = time.perf_counter(), peak

    worker = Worker(study, ledger, inputs)
    moment("engine")
    candidate = dense_round(worker)
    moment("dense")
    config = TrialConfig(schedule="linear", target_sparsity=0.5, num_rounds=2, finetune_epochs=1.0, learning_rate=1e-7)
    for action in resolve_actions(config, study, inputs.num_train_tokens):
        candidate = run_round(worker, candidate, action)
        moment(f"round to {action.sparsity}")
    worker.engine.load_base()
    worker.loaded_key = None
    load_candidate(worker, candidate)
    moment("candidate loaded")
    if rank == 0:
        size, micro_batch = model_size(study.model.path), worker.micro_batch()
        planned = rank_bytes(size, num_ranks=num_ranks, zero_stage=3, dtype="bfloat16", micro_batch=micro_batch)
        print(json.dumps({
            "benchmark": "large_model", "shape": options.shape, "num_parameters": size.num_parameters, "num_ranks": num_ranks,
            "predicted_gb": round(sum(planned.values()) / 1e9, 2), "micro_batch": micro_batch, "moments": moments,
            "sparsity": candidate.sparsity, "bits_per_byte": candidate.metrics["text/bits_per_byte"].value,
            "device": device_name("cuda" if is_gpu else "cpu"), "torch": torch.__version__,
            "date": datetime.date.today().isoformat()}))
        shutil.rmtree(folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
