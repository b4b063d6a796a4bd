"""Times our Scorer against lm-eval's Hugging Face backend: same model, items and dtype, alternating in one process.

    python benchmarks/evaluation.py --model ../shared/models/books-30m --data-dir ../shared/data --task hellaswag

Prints one JSON line with the largest differences of answers, and fails where fp32 answers are not equal. lm-eval gets its
best batch size of those tried; how far apart its own batch sizes are is the noise. A model named gpt2-124m, gpt2-355m or
gpt2-1.5b has random weights and needs --tokenizer.
"""

# ruff: noqa: E402 - the environment is set before the imports that read it

import argparse
import datetime
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.disable(logging.WARNING)

import lm_eval
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from raysearch.evaluation import Evaluation, Scorer, evaluate, load_tasks

BATCH_SIZES = {"cpu": (4, 16), "cuda": (32, 64, 128, 256)}
NUM_TRIAL_ITEMS = {"cpu": 24, "cuda": 256}
SHAPES = {"gpt2-124m": {}, "gpt2-355m": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
          "gpt2-1.5b": {"n_embd": 1600, "n_layer": 48, "n_head": 25}}


class Recorder:
    """Passes requests to an lm-eval LM, keeps the answers and the seconds."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.answers, self.seconds, self.cpu_seconds = lm, list[Any](), 0.0, 0.0
        self.tok_encode = lm.tok_encode

    def __getattr__(self, request_type: str) -> Callable[[Sequence[Instance]], list[Any]]:
        def respond(requests: Sequence[Instance]) -> list[Any]:
            start, cpu_start = time.perf_counter(), time.process_time()
            answers = getattr(self.lm, request_type)(requests, disable_tqdm=True)
            self.seconds += time.perf_counter() - start
            self.cpu_seconds += time.process_time() - cpu_start  # what a busy machine does not change
            self.answers.extend(answers)
            return list(answers)
        return respond


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/books-30m")
    parser.add_argument("--tokenizer", default=None, help="folder of the tokenizer; default: the model's")
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--task", default="hellaswag")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--num-fewshot", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=100, help="items between alternations")
    parser.add_argument("--baseline-s", type=float, default=None,
                        help="seconds that lm-eval may take after its trials; lowers --limit, in two chunks")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=None, help="lm-eval's, to choose from")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of the options, on their device and in their dtype."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    if options.model in SHAPES:
        torch.manual_seed(0)
        with torch.device(options.device):
            model: Any = GPT2LMHeadModel(GPT2Config(**SHAPES[options.model]))
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    return model.to(options.device, getattr(torch, options.dtype)).eval(), tokenizer


def compare(options: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """One row of results; SystemExit where fp32 answers are not equal."""
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    is_cuda = model.device.type == "cuda"
    scorer = Scorer(model, tokenizer, batch_tokens=options.batch_tokens)

    def backend(batch_size: int) -> HFLM:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=options.device,
                    softmax_dtype="float32")

    def run(lm: Any, first: int, last: int) -> tuple[Evaluation, Recorder]:
        recorder = Recorder(lm)
        task, = load_tasks([options.task], data_dir=options.data_dir, limit=last)
        task.dataset["test"] = task.dataset["test"].select(range(first, min(last, len(task.dataset["test"]))))
        return evaluate(recorder, [task], num_fewshot=options.num_fewshot), recorder

    run(scorer, 0, 4)
    num_trial_items = NUM_TRIAL_ITEMS[model.device.type]
    trials = {size: run(backend(size), 0, num_trial_items)[1]
              for size in options.batch_sizes or BATCH_SIZES[model.device.type]}
    batch_size = min(trials, key=lambda size: trials[size].seconds)
    noise = [difference(trials[batch_size].answers, trial.answers) for trial in trials.values()]
    if options.baseline_s is not None:
        affordable = int(options.baseline_s * num_trial_items / trials[batch_size].seconds)
        task, = load_tasks([options.task], data_dir=options.data_dir, limit=options.limit)
        options.limit = max(2, min(options.limit, affordable, len(task.dataset["test"])))
        options.chunk = -(-options.limit // 2)
    seconds = {"lm_eval": 0.0, "raysearch": 0.0}
    cpu_seconds, peak_bytes = dict(seconds), {"lm_eval": 0, "raysearch": 0}
    worst, num_different = 0.0, 0
    totals: dict[str, list[float]] = {"lm_eval": [], "raysearch": []}
    for first in range(0, options.limit, options.chunk):
        order = [("lm_eval", backend(batch_size)), ("raysearch", scorer)]
        answers = {}
        for name, lm in order if first // options.chunk % 2 == 0 else reversed(order):
            if is_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            evaluation, recorder = run(lm, first, min(first + options.chunk, options.limit))
            if is_cuda:
                peak_bytes[name] = max(peak_bytes[name], torch.cuda.max_memory_allocated())
            seconds[name] += recorder.seconds
            cpu_seconds[name] += recorder.cpu_seconds
            answers[name] = recorder.answers
            accuracy = next(key for key in evaluation.items if key.partition("/")[2] in ("acc", "exact_match"))
            totals[name].extend(evaluation.items[accuracy].numerator.tolist())
        chunk_worst, chunk_different = difference(answers["lm_eval"], answers["raysearch"])
        worst, num_different = max(worst, chunk_worst), num_different + chunk_different
    num_flips = sum(a != b for a, b in zip(totals["lm_eval"], totals["raysearch"], strict=True))
    device = torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine()
    if options.dtype == "float32" and (num_flips or worst > 1e-4):
        raise SystemExit(f"not equal to lm-eval: {num_flips} items judged differently, log-likelihoods {worst} apart")
    return {
        "benchmark": "evaluation", "task": options.task, "num_fewshot": options.num_fewshot,
        "num_items": len(totals["raysearch"]), "model": Path(options.model).name,
        "random_weights": options.model in SHAPES, "dtype": options.dtype,
        "lm_eval_s": round(seconds["lm_eval"], 2), "raysearch_s": round(seconds["raysearch"], 2),
        "ratio": round(seconds["lm_eval"] / seconds["raysearch"], 2), "lm_eval_batch_size": batch_size,
        "batch_tokens": scorer.batch_tokens,
        "lm_eval_cpu_s": round(cpu_seconds["lm_eval"], 2), "raysearch_cpu_s": round(cpu_seconds["raysearch"], 2),
        "cpu_ratio": round(cpu_seconds["lm_eval"] / cpu_seconds["raysearch"], 2),
        "accuracy": sum(totals["raysearch"]) / len(totals["raysearch"]),
        "lm_eval_accuracy": sum(totals["lm_eval"]) / len(totals["lm_eval"]), "num_items_judged_differently": num_flips,
        "num_different_answers": num_different, "max_abs_logprob_difference": worst,
        "lm_eval_batch_size_noise": {"num_different_answers": max(n for _, n in noise),
                                     "max_abs_logprob_difference": max(x for x, _ in noise)},
        "peak_bytes": peak_bytes if is_cuda else None, "model_bytes": sum(p.nbytes for p in model.parameters()),
        "device": device, "threads": options.threads, "torch": torch.__version__,
        "transformers": transformers.__version__, "lm_eval": lm_eval.__version__,
        "date": datetime.date.today().isoformat(),
    }


def difference(left: Sequence[Any], right: Sequence[Any]) -> tuple[float, int]:
    """(largest absolute difference of the log-likelihoods, how many texts or greedy flags differ)."""
    if isinstance(left[0], str):
        return 0.0, sum(a != b for a, b in zip(left, right, strict=True))
    return (max(abs(a[0] - b[0]) for a, b in zip(left, right, strict=True)),
            sum(a[1] != b[1] for a, b in zip(left, right, strict=True)))


if __name__ == "__main__":
    given = arguments()
    print(json.dumps(compare(given, *load(given))))
