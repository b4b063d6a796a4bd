"""The whole GPU table of evaluation, about 200 s on one H200: speed in bf16, equality in fp32, graphs, memory.

    python benchmarks/evaluation_gpu.py --data-dir data --models models --out docs/results/evaluation_gpu.md

DATA_DIR holds the tasks' files and gpt2_tokenizer/, MODELS holds books-30m/. Prints one JSON line a case as it ends and
writes them as Markdown tables. A case that fails is a line with its error, and the exit code is 1.
"""

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from evaluation import arguments, compare, load

from raysearch.evaluation import Scorer, evaluate, load_tasks

SPEED = [  # model, task, shots, items at most, must, aim
    ("gpt2-124m", "hellaswag", 0, 10_042, 3, 6),
    ("gpt2-124m", "lambada", 0, 5_153, 2, 4),
    ("gpt2-124m", "triviaqa", 5, 1_600, 3, 8),  # line 1,666 of ../shared/data is broken
    ("gpt2-1.5b", "hellaswag", 0, 10_042, 2, 3),
]
EQUALITY = [(task, shots) for task in ("lambada", "hellaswag", "triviaqa") for shots in (0, 3)]
GRAPH_BATCH_TOKENS = (2048, 8192, 32768)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="Markdown; the JSON lines go beside it")
    parser.add_argument("--baseline-s", type=float, default=12, help="of lm-eval in each case, after its trials")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def case(name: str, measure: Callable[..., dict[str, Any]], *args: Any) -> None:
        start = time.perf_counter()
        try:
            row = measure(*args)
        except (Exception, SystemExit) as error:  # the other cases are worth their GPU time
            row = {"error": f"{type(error).__name__}: {error}"}
        rows.append({"case": name, **row, "wall_s": round(time.perf_counter() - start, 1)})
        gc.collect()  # a Scorer and its graphs hold each other, and the model
        print(json.dumps(rows[-1]), flush=True)
        options.out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options.out.write_text(markdown(rows, options.device))

    def given(model: str, task: str, shots: int, limit: int, dtype: str) -> argparse.Namespace:
        tokenizer = ["--tokenizer", str(options.data_dir / "gpt2_tokenizer")] if model.startswith("gpt2-") else []
        path = model if model.startswith("gpt2-") else str(options.models / model)
        return arguments(["--model", path, *tokenizer, "--data-dir", str(options.data_dir), "--task", task, "--limit",
                          str(limit), "--num-fewshot", str(shots), "--chunk", str(limit), "--dtype", dtype, "--device",
                          options.device, "--baseline-s", str(options.baseline_s)])

    for model, task, shots, limit, must, aim in SPEED:
        case("speed", speed, given(model, task, shots, limit, "bfloat16"), must, aim)
    for task, shots in EQUALITY:
        case("equality", equality, given("books-30m", task, shots, 512, "float32"))
    for batch_tokens in GRAPH_BATCH_TOKENS:
        case("graphs", graphs, given("gpt2-124m", "hellaswag", 0, 500, "bfloat16"), batch_tokens)
    case("memory", memory, given("gpt2-124m", "lambada", 0, 1, "bfloat16"))
    return int(any("error" in row for row in rows))


def speed(options: argparse.Namespace, must: float, aim: float) -> dict[str, Any]:
    return {**compare(options, *load(options)), "must": must, "aim": aim}


def equality(options: argparse.Namespace) -> dict[str, Any]:
    options.batch_sizes, options.baseline_s = [64], None
    return compare(options, *load(options))


def graphs(options: argparse.Namespace, batch_tokens: int) -> dict[str, Any]:
    """Seconds of evaluating the same items again and again, as after every round: eager, and with graphs."""
    model, tokenizer = load(options)
    tasks = load_tasks([options.task], data_dir=options.data_dir, limit=options.limit)
    passes_s: dict[str, list[float]] = {}
    num_captured = 0
    for name, allowed in (("eager_s", False), ("graphs_s", True)):
        scorer = Scorer(model, tokenizer, batch_tokens=batch_tokens, graphs=allowed)
        for _ in range(4):
            start = time.perf_counter()
            evaluate(scorer, tasks)
            passes_s.setdefault(name, []).append(round(time.perf_counter() - start, 3))
        num_captured = scorer._graphs.num_captured if scorer._graphs is not None else 0
    return {"model": options.model, "task": options.task, "num_items": options.limit, "batch_tokens": batch_tokens,
            "num_captured": num_captured, **passes_s}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak of scoring 2 tokens in each of 64 rows of 512 tokens, beside what all their logits would take."""
    model, tokenizer = load(options)
    scorer = Scorer(model, tokenizer, batch_tokens=32_768)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scorer.score([(tuple(range(n, n + 511)), (7, 8)) for n in range(64)])
    return {"batch_tokens": 32_768, "vocab_size": model.config.vocab_size,
            "peak_bytes_above_model": torch.cuda.max_memory_allocated() - before,
            "bytes_of_all_logits_bf16": 32_768 * model.config.vocab_size * 2}


def markdown(rows: list[dict[str, Any]], device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    dates = [row["date"] for row in rows if "date" in row] or [time.strftime("%Y-%m-%d")]
    lines = [f"`{' '.join(['python', *sys.argv])}`, {dates[0]}, {where}, torch {torch.__version__}, transformers "
             f"{transformers.__version__}.", ""]
    columns = {
        "speed": ["model", "task", "num_fewshot", "num_items", "lm_eval_batch_size", "lm_eval_s", "raysearch_s", "ratio",
                  "must", "aim", "num_items_judged_differently", "max_abs_logprob_difference"],
        "equality": ["task", "num_fewshot", "num_items", "num_items_judged_differently", "num_different_answers",
                     "max_abs_logprob_difference", "accuracy"],
        "graphs": ["task", "num_items", "batch_tokens", "num_captured", "eager_s", "graphs_s"],
        "memory": ["batch_tokens", "vocab_size", "peak_bytes_above_model", "bytes_of_all_logits_bf16"],
    }
    for case, names in columns.items():
        of_case = [row for row in rows if row["case"] == case]
        if of_case:
            lines += [f"**{case}**", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
            lines += [f"| {row['error']} |" if "error" in row else f"| {' | '.join(str(row[name]) for name in names)} |"
                      for row in of_case]
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
