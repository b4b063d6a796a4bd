"""Frozen settings: what a user may write, checked once at the border and passed on as plain values.

`TrialConfig` is what varies between trials, `Study` is what is fixed for all of them, `Action` is one resolved round.
"""

from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Schedule = Literal["one_shot", "constant", "linear", "exponential", "cubic", "cosine"]
Scope = Literal["global", "layer", "row"]
ThresholdUnit = Literal["absolute", "std"]


class Frozen(BaseModel):
    """Base of every settings and record class: unknown fields, wrong types and later changes are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


FrozenT = TypeVar("FrozenT", bound=Frozen)


def parse(cls: type[FrozenT], data: dict[str, Any], where: str) -> FrozenT:
    """`cls(**data)`, or a ValueError of one sentence that names `where`, the field, the rule and the value."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first, *others = error.errors()
        field = ".".join(str(part) for part in first["loc"])
        rule = first["msg"].removeprefix("Value error, ")
        if alternatives := [other["msg"] for other in others if other["loc"][:1] == first["loc"][:1]]:  # of a union
            field, rule = str(first["loc"][0]), " or ".join([rule, *alternatives])
        if first["type"] == "extra_forbidden":
            rule = f"no such field; the fields are {', '.join(cls.model_fields)}"
        given = f" (got {first['input']!r})" if field else ""
        raise ValueError(f"{where}: {f'{field}: ' if field else ''}{rule}{given}") from error


class Metric(Frozen):
    """One measured number of one task."""

    value: float
    stderr: float | None
    """Standard error of `value` over the items; None where it has none."""
    num_items: int


def higher_is_better(metric: str) -> bool:
    """Direction of a metric by its name ("task/metric"): accuracies up; perplexities, bits and losses down."""
    name = metric.rpartition("/")[2]
    if name.startswith(("acc", "exact_match", "f1")):
        return True
    if name.endswith(("perplexity", "bits_per_byte", "loss")):
        return False
    raise ValueError(f"metric {metric!r}: its direction is not known; use one that starts with acc, exact_match or f1, "
                     "or ends with perplexity, bits_per_byte or loss")


class TrialConfig(Frozen):
    """What one trial does; the fields that `space(trial)` returns. Exactly one of three modes:
    by target (`target_sparsity`), by rate (`schedule="constant"`, `rate`), by threshold (`threshold`)."""

    schedule: Schedule = "one_shot"
    """Path of the sparsity over the rounds; of the threshold in threshold mode (one_shot or linear)."""
    initial_sparsity: float = Field(0.0, ge=0, lt=1)
    """Sparsity at which the path starts, before round 1."""
    target_sparsity: float | None = Field(None, ge=0, lt=1)
    """Sparsity among prunable weights after the last round."""
    num_rounds: int | None = Field(None, ge=1)
    """Prune, fine-tune, evaluate this many times."""
    rate: float | None = Field(None, gt=0, lt=1)
    """Fraction of the remaining weights removed in each round (schedule "constant")."""
    threshold: float | None = Field(None, gt=0)
    """Weights whose magnitude is below it are pruned."""
    threshold_unit: ThresholdUnit = "absolute"
    """`std`: the threshold counts standard deviations of each layer (Han et al. 2015)."""
    criterion: str = "magnitude"
    """How weights are ranked: one of pruning.criteria.CRITERIA. `movement` learns while it fine-tunes."""
    pattern: str = "unstructured"
    """Which weights go together: one of pruning.patterns.PATTERNS. The sparsity is then that of the pattern's weights."""
    scope: Scope = "global"
    """Comparison group of the scores."""
    mask_interval_steps: int = Field(10, ge=1)
    """Steps between two changes of the masks, where the criterion prunes while it fine-tunes."""
    l1_lambda: float = Field(0.0, ge=0)
    """Strength of the proximal L1 step during fine-tuning, in units of the weights per unit of learning rate."""
    finetune_epochs: float = Field(0.0, ge=0)
    """Epochs of fine-tuning after each prune."""
    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate of each round."""

    @model_validator(mode="after")
    def _one_mode(self) -> Self:
        if self.threshold is not None:
            for field in ("target_sparsity", "rate"):
                if getattr(self, field) is not None:
                    raise ValueError(f"threshold and {field} contradict each other (a threshold already fixes the "
                                     f"sparsity): got {self.threshold} and {getattr(self, field)}; give one of them")
            if self.schedule not in ("one_shot", "linear"):
                raise ValueError(f"schedule with a threshold must be one_shot or linear, got {self.schedule!r}")
            if self.initial_sparsity:
                raise ValueError(f"initial_sparsity with a threshold must be 0, got {self.initial_sparsity}")
            if self.scope != "global":
                raise ValueError(f"scope with a threshold must stay global (nothing is ranked), got {self.scope!r}")
        elif self.threshold_unit != "absolute":
            raise ValueError(f"threshold_unit {self.threshold_unit!r} needs a threshold, got None; give threshold")
        return self


class Action(Frozen):
    """One resolved round: prune, then fine-tune. Equal actions on equal parents give equal candidates."""

    criterion: str = "magnitude"
    pattern: str = "unstructured"
    scope: Scope = "global"
    mask_interval_steps: int = 0
    """0 where masks do not change while it fine-tunes."""
    sparsity: float | None = None
    """Fraction of the pattern's weights that is pruned at the end of the round; None in threshold mode."""
    threshold: float | None = None
    threshold_unit: ThresholdUnit = "absolute"
    l1_lambda: float = 0.0
    learning_rate: float = 0.0
    finetune_tokens: int = 0
    data_start_tokens: int = 0
    """Where in the endless stream of shuffled epochs this round's fine-tuning begins."""
    seed: int = 0
    """Seed of the data order; 0 where nothing is fine-tuned."""


class Study(Frozen):
    """What is fixed for all trials of one study: `STUDY` in a search space module."""

    model: str
    """Folder of a Hugging Face causal language model, with its tokenizer."""
    corpus: str | None = "builtin"
    """Text to fine-tune on and to hold out: "builtin", a file, folder or glob (.txt, .jsonl, .parquet), or a Hugging Face
    dataset name; None where nothing is fine-tuned."""
    tasks: tuple[str, ...] = ("text", "last_word", "choice")
    """Evaluation tasks; text, last_word and choice are made from the corpus's held-out documents."""
    data_dir: str | None = None
    """Folder with local files of the named tasks (lambada/test.jsonl, ...); None takes them from the hub."""
    objective: str = "text/bits_per_byte"
    """The quality that the search improves, as task/metric on the selection split."""
    size: Literal["num_nonzero", "stored_bytes"] = "num_nonzero"
    """The size that the search lowers."""
    num_trials: int = Field(16, ge=1)
    max_concurrent: int = Field(1, ge=1)
    """Trials at the same time."""
    time_budget_s: float | None = Field(None, gt=0)
    prunable: Literal["matrices", "all"] = "matrices"
    """`matrices`: attention and MLP; `all` adds the embeddings (once, when tied)."""
    context_tokens: int = Field(128, ge=2)
    batch_tokens: int = Field(1024, ge=2)
    """Tokens of one optimizer step, over all ranks."""
    epoch_tokens: int | None = Field(None, ge=1)
    """Tokens that count as one epoch; None is the whole train split."""
    weight_decay: float = Field(0.0, ge=0)
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    """Share of each round's steps in which the learning rate rises; it falls to a tenth along a half cosine after."""
    eval_items: int | None = Field(None, ge=1)
    """Items of each task and split; None is all."""
    racing_level: float | None = Field(None, gt=0, lt=1)
    """Stop scoring a candidate on the selection split when a finished one that is no larger has the better objective;
    each such stop is wrong with at most this probability. None scores every candidate in full, and is the default:
    how many items a dominated candidate is scored on depends on what was finished before it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the module's weights, in training, evaluation and export; masters are fp32. `auto` is the checkpoint's own."""
    zero_stage: Literal[0, 1, 2, 3, "auto"] = 0
    num_ranks: int | Literal["auto"] = 1
    """Processes of one trial. `auto`, here and for zero_stage: the smallest that fit the GPUs' memory (placement.py);
    one rank at stage 0 on a CPU."""
    round_limit_s: float = Field(3600.0, gt=0)
    """A round that takes longer is taken for stuck: its gang is ended and started again, once, and then its trial fails
    with the stack of every rank."""
    gpus_per_rank: float = Field(0.0, ge=0)
    cpus_per_rank: float = Field(1.0, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        higher_is_better(self.objective)
        num_ranks = 1 if self.num_ranks == "auto" else self.num_ranks
        if num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, or auto, got {num_ranks}")
        per_step = self.context_tokens * num_ranks
        if self.batch_tokens % per_step:
            raise ValueError(f"batch_tokens must be a multiple of context_tokens * num_ranks = {per_step}, "
                             f"got {self.batch_tokens}")
        if num_ranks > 1 and 0 < self.gpus_per_rank < 1:
            raise ValueError("gpus_per_rank below 1 needs num_ranks 1 (NCCL refuses two ranks on one GPU), "
                             f"got {self.gpus_per_rank} and {self.num_ranks}")
        return self
