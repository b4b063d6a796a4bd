"""Everything that outlives rounds and trials on one rank: the engine, the text, the evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from raysearch.config import Study, higher_is_better
from raysearch.data import Blocks, check_tokenizer, load_documents, pack, split_documents
from raysearch.engine import Engine
from raysearch.evaluation import (
    Evaluation,
    Race,
    Scorer,
    Task,
    evaluate,
    heldout_tasks,
    load_tasks,
    metric_names,
    tasks_fingerprint,
)
from raysearch.evaluation.racing import is_dominated, item_order
from raysearch.ledger import Ledger, RoundRecord, hash_json
from raysearch.model import context_limit, fingerprint, load_config, load_tokenizer, model_folder, stored_dtype

HELDOUT_TASKS = ("text", "last_word", "choice")
START_LIMIT_S = 600.0
"""Shortest timeout of the process group: its ranks also wait for each other's imports."""
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


class Bench:
    """One rank's workbench. Collective: every rank of the gang builds one and calls it in the same order.

    `base`: the dense weights where somebody keeps them for all ranks of a node (Engine).
    """

    def __init__(self, study: Study, ledger: Ledger, inputs: Inputs, base: Mapping[str, Tensor] | None = None) -> None:
        self.study, self.ledger, self.inputs = study, ledger, inputs
        self.engine = Engine(study.model, prunable=study.prunable, zero_stage=study.zero_stage, dtype=study.dtype,
                             batch_tokens=study.batch_tokens, context_tokens=study.context_tokens,
                             weight_decay=study.weight_decay, timeout_s=max(study.round_limit_s, START_LIMIT_S),
                             base=base)
        tokenizer = load_tokenizer(study.model)
        self.vocab_size = int(self.engine.model.config.vocab_size)
        self.scorer = Scorer(self.engine.model, tokenizer, rank=self.engine.rank, world_size=self.engine.world_size,
                             gather=self.engine.gather_objects, lockstep=study.zero_stage == 3)
        self.loaded_key: str | None = None
        """The candidate whose weights the engine holds now; None while they are being changed."""

    def evaluate(self, split: str, race: Race | None = None) -> Evaluation:
        """Of the engine's current weights, on "selection" or "report"."""
        self.engine.model.eval()
        return evaluate(self.scorer, self.inputs.tasks[split], race=race)

    def race(self, size: int | None) -> tuple[Race | None, str | None]:
        """(the race of a candidate of this size, key of its rival, the best finished one that is no larger); without
        racing (None, None). With no size or no rival the items still come in the same parts, which rounding depends on.
        """
        study = self.study
        if study.racing_level is None or not self.inputs.tasks["selection"]:
            return None, None
        level = study.racing_level
        key, losses = self.engine.from_rank_0(lambda: self._rival(size)) if size is not None else (None, [])
        rival = [losses[item] for item in item_order(len(losses), study.seed)]

        def is_lost(own: list[float]) -> bool:
            return key is not None and self.engine.from_rank_0(lambda: is_dominated(own, rival, level))

        return Race(study.objective, study.seed, is_lost), key

    def _rival(self, size: int) -> tuple[str | None, list[float]]:
        sign = 1 if higher_is_better(self.study.objective) else -1

        def quality(record: RoundRecord) -> float:
            return sign * record.metrics[self.study.objective].value

        finished = [record for record in self.ledger.rounds().values()
                    if record.dominated_by is None and getattr(record, self.study.size) <= size]
        best = max(finished, key=quality, default=None)
        return (best.key, self.ledger.losses(best.key)) if best else (None, [])
