"""`raysearch evaluate`: a dense, pruned, compressed or compacted model on named tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from raysearch.bench import HELDOUT_TASKS
from raysearch.data import check_tokenizer, load_documents, split_documents
from raysearch.evaluation import Scorer, evaluate, heldout_tasks, load_tasks
from raysearch.export import COMPRESSED, load
from raysearch.model import load_model, load_tokenizer, stored_dtype


def evaluate_model(model_path: str, names: Sequence[str], *, data_dir: Path | None, corpus: str, limit: int | None,
                   num_fewshot: int | None, batch_tokens: int | None, samples: Path | None,
                   progress: bool, backend: str = "dense") -> dict[str, Any]:
    """{"results": {task: {metric: value, metric_stderr: value, "num_items": n}}, "num_truncated": n, ...}.

    backend "auto" replaces linear layers by sparse ones where those are measured to be faster; "dense" never does.
    text, last_word and choice are made from the corpus's report split; the others come from `data_dir` or the hub, whole.
    """
    if backend not in ("auto", "dense"):
        raise ValueError(f"backend must be auto or dense, got {backend!r}")
    exported = (Path(model_path) / COMPRESSED).is_file()
    model = load(model_path) if exported else load_model(model_path, getattr(torch, stored_dtype(model_path)))
    tokenizer = load_tokenizer(model_path)
    check_tokenizer(tokenizer, model.config.vocab_size)
    tasks = load_tasks([name for name in names if name not in HELDOUT_TASKS], data_dir=data_dir, limit=limit)
    if own := [name for name in names if name in HELDOUT_TASKS]:
        tasks = heldout_tasks(split_documents(load_documents(corpus))["report"], own, limit=limit) + tasks
    if torch.cuda.is_available():
        model = model.to("cuda")
    elif model.dtype == torch.bfloat16:
        model = model.float()  # a CPU is faster and more exact in fp32
    scorer = Scorer(model, tokenizer, batch_tokens=batch_tokens, progress=progress)
    kernels = "dense"
    if backend == "auto":
        from raysearch.kernels import sparsify_for_inference

        kernels = str(sparsify_for_inference(model, num_tokens=scorer.batch_tokens))
    metrics = evaluate(scorer, tasks, num_fewshot=num_fewshot, samples_path=samples).metrics
    results: dict[str, dict[str, Any]] = {}
    for name, metric in metrics.items():
        task, _, key = name.rpartition("/")
        row = results.setdefault(task, {})
        row |= {key: metric.value, f"{key}_stderr": metric.stderr, "num_items": metric.num_items}
    return {"results": results, "model": model_path, "num_truncated": scorer.num_truncated, "kernels": kernels,
            "device": str(scorer.device), "dtype": str(model.dtype).removeprefix("torch.")}
