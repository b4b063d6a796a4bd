"""What a study reads: model, text and tasks, resolved once by the driver and checked on every rank."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raysearch.config import Study
from raysearch.evaluation import (
    Task,
    heldout_tasks,
    load_tasks,
    metric_names,
    tasks_fingerprint,
)
from raysearch.evaluation.names import check_measured
from raysearch.models.model import (
    check_model,
    context_limit,
    dtype_note,
    fingerprint,
    load_config,
    load_tokenizer,
    model_folder,
    stored_dtype,
    vocab_size,
)
from raysearch.study.records import StudyRecord, root_key
from raysearch.training.corpus import Say, load_documents, quiet
from raysearch.training.data import Blocks, check_tokenizer, pack, split_documents

HELDOUT_TASKS = ("text", "last_word", "choice")


@dataclass(frozen=True)
class Inputs:
    """What a study reads, resolved once by the driver and checked on every rank."""

    root_key: str
    """Key of the dense baseline: a hash of all that is fixed and can change a number, and of nothing else."""
    num_train_tokens: int
    tasks: Mapping[str, Sequence[Task]]
    """Split ("selection", "report") -> evaluation tasks."""
    blocks: Blocks | None
    """Packed training text; None without a corpus."""
    tokenizer: Any = None
    """Hugging Face's; None without a corpus and tasks, where a model needs none."""


def resolve(study: Study, say: Callable[[str], object] = lambda line: None) -> Study:
    """The study with its model as an absolute path and `auto` settings decided; `say` gets a line where the weights are of
    another type. ValueError for a model that is none, or whose weights are not all there and finite: whoever calls this has
    written nothing yet."""
    model = str(model_folder(study.model.path))
    dtype = stored_dtype(model) if study.model.dtype == "auto" else study.model.dtype
    check_model(model, getattr(torch, dtype))
    if (note := dtype_note(model, dtype)) is not None:
        say(note)
    return study.replaced(path=model, dtype=dtype)


def read_inputs(study: Study, say: Say = quiet) -> Inputs:
    """Reads and packs the corpus, makes the tasks and hashes what determines the results; says how far a long corpus is.
    ValueError of one sentence for bad input."""
    model_hash = fingerprint(study.model.path)
    config = load_config(study.model.path)
    tokenizer: Any = None
    if study.data.corpus is not None or study.evaluation.tasks:
        tokenizer = load_tokenizer(study.model.path)
        check_tokenizer(tokenizer, vocab_size(config))
    limit = context_limit(config)
    if study.data.corpus is not None and study.data.context_tokens > limit:
        raise ValueError(f"context_tokens must be at most the model's {limit}, got {study.data.context_tokens}")
    blocks, documents = None, {}
    if study.data.corpus is not None:
        documents = split_documents(load_documents(study.data.corpus, study.data.text_field, say))
    tasks = read_tasks(study, documents)  # before what takes long
    if study.data.corpus is not None:
        blocks = pack(documents["train"], tokenizer, study.data.context_tokens, "train", say=say)
    contents = [model_hash, blocks.fingerprint if blocks else None, *(tasks_fingerprint(each) for each in tasks.values())]
    return Inputs(root_key(study, contents), blocks.num_tokens if blocks else 0, tasks, blocks, tokenizer)


def same_inputs(described: StudyRecord, what_fails: str) -> Inputs:
    """Of a study that is there; ValueError where the files of its model, text or tasks are others now."""
    inputs = read_inputs(described.study)
    if inputs.root_key != described.root_key:
        raise ValueError(f"{what_fails} because the files of the model, the corpus or the tasks are not the study's; put those "
                         "back")
    return inputs


def read_tasks(study: Study, documents: Mapping[str, Sequence[str]] | None = None) -> dict[str, list[Task]]:
    """By split. `documents` are those of the corpus by split, where they were read already."""
    evaluation, corpus = study.evaluation, study.data.corpus
    heldout = [task for task in evaluation.tasks if task in HELDOUT_TASKS]
    named = [task for task in evaluation.tasks if task not in HELDOUT_TASKS]
    if heldout and corpus is None:
        raise ValueError(f"tasks {', '.join(heldout)} are made from the corpus's held-out documents, but corpus is None; "
                         "give a corpus or other tasks")
    if documents is None:
        documents = split_documents(load_documents(corpus, study.data.text_field)) if heldout and corpus else {}
    folder = Path(evaluation.data_dir) if evaluation.data_dir else None
    limits = {"selection": evaluation.num_items, "report": evaluation.num_report_items or evaluation.num_items}
    return {split: heldout_tasks(documents.get(split, ()), heldout, limit=limit, seed=study.data.seed)
            + load_tasks(named, data_dir=folder, split=split, limit=limit) for split, limit in limits.items()}


def check_objectives(study: Study, inputs: Inputs) -> None:
    """ValueError of one sentence unless what the search looks at is measured, and the time that it asks for can be."""
    check_measured(study, metric_names(inputs.tasks["selection"]))
    asked, limit = study.serving.prompt_tokens + study.serving.new_tokens, context_limit(load_config(study.model.path))
    if study.search.predicts_ms and asked > limit:
        raise ValueError(f"predicted_ms is the time of serving's prompt_tokens and new_tokens, which must be at most {limit:g} "
                         f"together, the model's context, got {asked}; change serving in STUDY")
