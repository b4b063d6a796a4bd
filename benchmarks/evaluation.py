"""Times our Scorer against lm-eval's Hugging Face backend: same model, items and dtype, alternating in one process.

    python benchmarks/evaluation.py --model ../shared/models/books-30m --data-dir ../shared/data --task hellaswag

Checks equal accuracy and log-likelihoods, then prints one JSON line. lm-eval gets its best batch size of those tried.
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
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.disable(logging.WARNING)

import lm_eval
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysearch.evaluation import Evaluation, Scorer, evaluate, load_tasks

BATCH_SIZES = {"cpu": (4, 16), "cuda": (32, 64, 128, 256)}
NUM_TRIAL_ITEMS = 24


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/books-30m")
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--task", default="hellaswag")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--num-fewshot", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=100, help="items between alternations")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
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
    tried = {size: run(backend(size), 0, NUM_TRIAL_ITEMS)[1].seconds for size in BATCH_SIZES[model.device.type]}
    batch_size = min(tried, key=lambda size: tried[size])
    seconds = {"lm_eval": 0.0, "raysearch": 0.0}
    cpu_seconds = dict(seconds)
    worst, num_different = 0.0, 0
    totals: dict[str, list[float]] = {"lm_eval": [], "raysearch": []}
    for first in range(0, options.limit, options.chunk):
        order = [("lm_eval", backend(batch_size)), ("raysearch", scorer)]
        answers = {}
        for name, lm in order if first // options.chunk % 2 == 0 else reversed(order):
            evaluation, recorder = run(lm, first, min(first + options.chunk, options.limit))
            seconds[name] += recorder.seconds
            cpu_seconds[name] += recorder.cpu_seconds
            answers[name] = recorder.answers
            accuracy = next(key for key in evaluation.items if key.partition("/")[2] in ("acc", "exact_match"))
            totals[name].extend(evaluation.items[accuracy])
        for a, b in zip(answers["lm_eval"], answers["raysearch"], strict=True):
            if isinstance(a, str):
                num_different += a != b
            else:
                worst, num_different = max(worst, abs(a[0] - b[0])), num_different + (a[1] != b[1])
    assert totals["lm_eval"] == totals["raysearch"], "accuracy differs"
    assert worst < (1e-4 if options.dtype == "float32" else 0.5), f"log-likelihoods differ by {worst}"
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else platform.processor() or platform.machine()
    print(json.dumps({
        "benchmark": "evaluation", "task": options.task, "num_fewshot": options.num_fewshot,
        "num_items": len(totals["raysearch"]), "model": Path(options.model).name, "dtype": options.dtype,
        "lm_eval_s": round(seconds["lm_eval"], 2), "raysearch_s": round(seconds["raysearch"], 2),
        "ratio": round(seconds["lm_eval"] / seconds["raysearch"], 2), "lm_eval_batch_size": batch_size,
        "batch_tokens": scorer.batch_tokens,
        "lm_eval_cpu_s": round(cpu_seconds["lm_eval"], 2), "raysearch_cpu_s": round(cpu_seconds["raysearch"], 2),
        "cpu_ratio": round(cpu_seconds["lm_eval"] / cpu_seconds["raysearch"], 2),
        "accuracy": sum(totals["raysearch"]) / len(totals["raysearch"]), "accuracy_identical": True,
        "num_different_answers": num_different, "max_abs_logprob_difference": worst,
        "device": device, "threads": options.threads, "torch": torch.__version__,
        "transformers": transformers.__version__, "lm_eval": lm_eval.__version__,
        "date": datetime.date.today().isoformat(),
    }))


if __name__ == "__main__":
    main()
