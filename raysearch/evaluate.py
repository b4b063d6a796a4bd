"""`raysearch evaluate`: a dense, pruned, sparse or compact model on named tasks."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raysearch.deploy.export import OWN_FILE
from raysearch.deploy.load import open_model
from raysearch.evaluation import Scorer, evaluate, forward_sizes, heldout_tasks, load_tasks
from raysearch.evaluation.tasks import HELDOUT_CONFIGS
from raysearch.models.model import check_causal, dtype_note, load_tokenizer, stored_dtype, vocab_size
from raysearch.models.sparse import is_sparse, linear_layers, own_forward, sparsify_for_inference
from raysearch.study.text import first_line
from raysearch.training.corpus import Say, load_documents, quiet
from raysearch.training.data import check_tokenizer, split_documents

TIMED_FORWARDS = 50
"""What timing sparse kernels for one number of tokens costs, about: 32 forwards of the model, and those of its layers."""
MAX_TIMING_S = 30.0
"""Timing that takes longer is done only where the evaluation takes twice as long as the timing."""


def evaluate_model(model_path: str, names: Sequence[str], *, data_dir: Path | None, corpus: str, limit: int | None,
                   num_fewshot: int | None, batch_tokens: int | None, samples: Path | None, progress: bool,
                   text_field: str = "text", backend: str = "auto", say: Say = quiet) -> dict[str, Any]:
    """{"results": {task: {metric: value, metric_stderr: value, "num_items": n}}, "num_truncated": n, "kernels": ...}.

    backend "auto" replaces the linear layers of a pruned model by sparse ones where those are measured to be faster, and
    says one line about it; "dense" never does. "kernels" holds, for each number of tokens per forward that was timed, how
    many sparse layers run on what and how many times as fast the model became.
    text, last_word and choice are made from the corpus's report split; the others come from `data_dir` or the hub, whole.
    """
    tasks = load_tasks([name for name in names if name not in HELDOUT_CONFIGS], data_dir=data_dir, limit=limit)
    if from_corpus := [name for name in names if name in HELDOUT_CONFIGS]:
        documents = split_documents(load_documents(corpus, text_field, say))["report"]
        tasks = heldout_tasks(documents, from_corpus, limit=limit) + tasks
    if not (Path(model_path) / OWN_FILE).is_file() and (note := dtype_note(model_path, stored_dtype(model_path))) is not None:
        say(note)
    model = open_model(model_path, "sparse" if backend == "auto" else "dense")
    check_causal(model)
    tokenizer = load_tokenizer(model_path)
    check_tokenizer(tokenizer, vocab_size(model.config))
    scorer = Scorer(model, tokenizer, batch_tokens=batch_tokens, progress=progress)
    kernels: dict[int, dict[str, Any]] = {}
    if backend == "auto" and (num_sparse := sum(map(is_sparse, (layer for *_, layer in linear_layers(model))))):
        sizes = worth_timing(model, forward_sizes(scorer, tasks, num_fewshot=num_fewshot))
        if sizes:
            done = sparsify_for_inference(model, num_tokens=sizes, say=say)
            kernels = {num_tokens: {"layers": dict(Counter("dense" if ratio <= 1 else layer.choices[num_tokens].backend
                                                           for layer in done.layers)), "model_ratio": ratio}
                       for num_tokens, ratio in done.model_ratio.items()}
        say(in_words(kernels, num_sparse))
    try:
        metrics = evaluate(scorer, tasks, num_fewshot=num_fewshot, samples_path=samples).metrics
    except RuntimeError as error:  # torch's, for a family that counts its positions in another way, or without memory
        raise ValueError(f"model {model_path}: cannot be scored ({first_line(error)})") from error
    results: dict[str, dict[str, Any]] = {}
    for name, metric in metrics.items():
        task, _, key = name.rpartition("/")
        row = results.setdefault(task, {})
        row |= {key: metric.value, f"{key}_stderr": metric.stderr, "num_items": metric.num_items}
    return {"results": results, "model": model_path, "num_truncated": scorer.num_truncated, "kernels": kernels,
            "device": str(scorer.device), "dtype": str(model.dtype).removeprefix("torch.")}


@torch.no_grad()
def worth_timing(model: Any, sizes: Mapping[int, int]) -> list[int]:
    """Of {tokens per forward: how many forwards}, those whose timing is short, or short beside the evaluation."""
    forward, worthwhile = own_forward(model), []
    for num_tokens, num_forwards in sizes.items():
        times_s = []
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            forward(num_tokens)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times_s.append(time.perf_counter() - started)
        if TIMED_FORWARDS * times_s[-1] <= MAX_TIMING_S or num_forwards >= 2 * TIMED_FORWARDS:
            worthwhile.append(num_tokens)
    return worthwhile


def in_words(kernels: Mapping[int, Mapping[str, Any]], num_sparse: int) -> str:
    """One line about {tokens per forward: {"layers": {backend: number of sparse layers}, "model_ratio": as fast as dense}}."""
    if not kernels:
        return f"kernels: {num_sparse} sparse layers, not timed because that would take longer than it could save"
    parts = [", ".join(f"{number} on {name}" for name, number in used["layers"].items())
             + f" at {num_tokens} tokens, the model {used['model_ratio']:.2f} times as fast as dense"
             for num_tokens, used in kernels.items()]
    return f"kernels: {num_sparse} sparse layers; " + "; ".join(parts)
