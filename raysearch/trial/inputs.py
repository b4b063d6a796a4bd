"""What a study reads: model, text and tasks, resolved once by the driver and checked on every rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raysearch.config import Study
from raysearch.evaluation import (
    Task,
    heldout_tasks,
    load_tasks,
    metric_names,
    tasks_fingerprint,
)
from raysearch.models.model import context_limit, fingerprint, load_config, load_tokenizer, model_folder, stored_dtype
from raysearch.study.records import hash_json
from raysearch.training.data import Blocks, check_tokenizer, load_documents, pack, split_documents

HELDOUT_TASKS = ("text", "last_word", "choice")
# what changes no number of a candidate: where things lie, and how many run at once on what
NOT_IN_KEY = {"model", "corpus", "data_dir", "objective", "size", "num_trials", "max_concurrent", "time_budget_s",
              "round_limit_s", "zero_stage", "num_ranks", "gpus_per_rank", "cpus_per_rank"}


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


def resolve(study: Study) -> Study:
    """The study with its model as an absolute path and `auto` settings decided; ValueError for a model that is none."""
    model = str(model_folder(study.model))
    return study.model_copy(update={"model": model,
                                    "dtype": stored_dtype(model) if study.dtype == "auto" else study.dtype})


def read_inputs(study: Study) -> Inputs:
    """Reads and packs the corpus, makes the tasks and hashes what determines the results; ValueError of one sentence for
    bad input."""
    model_hash = fingerprint(study.model)
    tokenizer = load_tokenizer(study.model)
    config = load_config(study.model)
    check_tokenizer(tokenizer, config.vocab_size)
    limit = context_limit(config)
    if study.corpus is not None and study.context_tokens > limit:
        raise ValueError(f"context_tokens must be at most the model's {limit}, got {study.context_tokens}")
    blocks, documents = None, {}
    own = [task for task in study.tasks if task in HELDOUT_TASKS]
    named = [task for task in study.tasks if task not in HELDOUT_TASKS]
    if own and study.corpus is None:
        raise ValueError(f"tasks {', '.join(own)} are made from the corpus's held-out documents, but corpus is None; "
                         "give a corpus or other tasks")
    if study.corpus is not None:
        documents = split_documents(load_documents(study.corpus))
        blocks = pack(study.corpus, tokenizer, study.context_tokens, "train")
    tasks = {split: heldout_tasks(documents.get(split, ()), own, limit=study.eval_items, seed=study.seed)
             + load_tasks(named, data_dir=Path(study.data_dir) if study.data_dir else None, split=split, limit=study.eval_items)
             for split in ("selection", "report")}
    unused = NOT_IN_KEY if study.racing_level else NOT_IN_KEY | {"racing_level"}
    key = hash_json([study.model_dump(exclude=unused, mode="json"), model_hash, blocks.fingerprint if blocks else None,
                     {split: tasks_fingerprint(each) for split, each in tasks.items()}])
    return Inputs(key, blocks.num_tokens if blocks else 0, tasks, blocks)


def check_objective(study: Study, inputs: Inputs) -> None:
    """ValueError of one sentence unless the objective is a metric of the study's tasks."""
    names = metric_names(inputs.tasks["selection"])
    if study.objective not in names:
        raise ValueError(f"objective must be one of the metrics {', '.join(names) or '(there is no task)'}, got "
                         f"{study.objective!r}; change it in STUDY, or add its task")
