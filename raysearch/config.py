"""Frozen settings: what a user may write, checked once at the border and passed on as plain values.

`TrialConfig` is what varies between trials, `Study` is what is fixed for all of them, `Action` is one resolved round.
"""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from raysearch.frozen import Frozen, parse

Schedule = Literal["one_shot", "constant", "linear", "exponential", "cubic", "cosine"]
Scope = Literal["global", "layer", "row"]
Budget = Literal["uniform", "erdos_renyi", "owl"]
LrSchedule = Literal["cosine", "constant", "one_cycle"]
Trainable = Literal["all", "vectors"]
ThresholdUnit = Literal["absolute", "std"]

SIZES = ("num_nonzero", "stored_bytes", "resident_bytes", "predicted_ms")
"""Sizes of a candidate that a search may lower: fields of its record. `predicted_ms`: time of a batch of `serving`."""


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


def is_maximised(objective: str) -> bool:
    """Direction of an objective: metrics, "task/metric", as `higher_is_better` says; sizes and times go down."""
    return "/" in objective and higher_is_better(objective)


class TrialConfig(Frozen):
    """What one trial does; the fields that `space(trial)` returns. Exactly one of three modes:
    by target (`target_sparsity`), by rate (`schedule="constant"`, `rate`), by threshold (`threshold`)."""

    schedule: Schedule = "one_shot"
    """Path of the sparsity over the rounds; of the threshold in threshold mode (one_shot or linear)."""
    initial_sparsity: float = Field(0.0, ge=0, lt=1)
    """Sparsity at which the path starts, before round 1."""
    target_sparsity: float | None = Field(None, ge=0, lt=1)
    """Sparsity after the last round, among the pattern's weights: all that are prunable, where each stands by itself."""
    num_rounds: int | None = Field(None, ge=1)
    """Prune, fine-tune, evaluate this many times."""
    rate: float | None = Field(None, gt=0, lt=1)
    """Fraction of the remaining weights removed in each round (schedule "constant")."""
    threshold: float | None = Field(None, gt=0)
    """Weights whose magnitude is below it are pruned; of criterion `soft_movement` those whose score's sigmoid is."""
    threshold_unit: ThresholdUnit = "absolute"
    """`std`: the threshold counts standard deviations of each layer (Han et al. 2015)."""
    criterion: str = "magnitude"
    """How weights are ranked: one of pruning.criteria.CRITERIA. `gradual_magnitude`, `sr_ste`, `movement`, `soft_movement`
    and `l0` prune while they fine-tune; `rigl` and `set` then drop weights for others."""
    pattern: str = "unstructured"
    """Which weights go together: one of pruning.patterns.PATTERNS, and the sparsity is then that of the pattern's weights; or
    N:M ("2:4"): of every M consecutive inputs of an output at most N stay, and `target_sparsity` is 1 - N/M, given or not."""
    scope: Scope = "global"
    """Comparison group of the scores."""
    uniform: bool = False
    """Under pattern head or neuron and scope layer: as many stay in every layer, at least one, so that what is left is an
    ordinary smaller model. Without it a layer that has lost more before, or all that it had, keeps fewer."""
    budget: Budget = "uniform"
    """What each layer gives up, where weights are compared within a layer or a row; under scope global the scores say it.
    `erdos_renyi`: large matrices give up more. `owl`: blocks with many outliers among their Wanda scores give up less."""
    owl_lambda: float = Field(0.08, ge=0, le=1)
    """How far a block's density may be from the mean under budget `owl`."""
    owl_m: float = Field(5.0, gt=0)
    """What is an outlier there: a score above this many times its block's mean."""
    mask_interval_steps: int = Field(10, ge=1)
    """Steps between two changes of the masks, where they change while it fine-tunes."""
    mask_decay: float = Field(2e-4, ge=0)
    """What criterion `sr_ste` adds to the gradient of what is masked, times its value; it rises from 0 to this until the last
    masks are made."""
    score_rate: float = Field(1e-2, gt=0)
    """Learning rate of the scores of `soft_movement`, whose `threshold` cuts their sigmoid."""
    score_penalty: float = Field(400.0, ge=0)
    """Lambda there: what it adds to the loss for the mean of that sigmoid, in nats per token."""
    gate_penalty: float = Field(1.0, ge=0)
    """Of `l0`: what it adds to the loss for the mean probability that a gate is open, in nats per token; `score_rate` is the
    learning rate of its gates."""
    drop_fraction: float = Field(0.3, gt=0, le=1)
    """Of each layer's kept weights, the share that `rigl` and `set` drop for others at a time; half a cosine brings it to 0."""
    calibration_sequences: int = Field(128, ge=1)
    """Sequences of the training text, of `context_tokens` each, that `wanda`, `ria`, `sparsegpt`, `taylor` and budget
    `owl` look at."""
    l1_lambda: float = Field(0.0, ge=0)
    """Strength of the proximal L1 step during fine-tuning, in units of the weights per unit of learning rate."""
    layer_drop: float = Field(0.0, ge=0, lt=1)
    """Chance that a layer is left out of a step of fine-tuning (LayerDrop), for masks that do not move meanwhile."""
    trainable: Trainable = "all"
    """What fine-tuning changes: `vectors` are biases and norms alone (PERP, Zimmer et al. 2023)."""
    group_lambda: float = Field(0.0, ge=0)
    """Strength of group lasso on whole units (pattern head, neuron or layer) during fine-tuning, in the same unit: a unit goes
    when the root of its mean square falls to the learning rate times this."""
    distill_alpha: float = Field(0.0, ge=0, le=1)
    """Share of the dense model's logits in the loss of fine-tuning: (1 - alpha) CE + alpha temperature^2 KL."""
    temperature: float = Field(1.0, gt=0)
    """What both models' logits are divided by for the KL; without meaning where `distill_alpha` is 0."""
    distill_hidden: float = Field(0.0, ge=0)
    """Weight of SquareHead in that loss: the squared difference of the hidden states from the dense model's, over their own
    square, behind each block."""
    finetune_epochs: float = Field(0.0, ge=0)
    """Epochs of fine-tuning after each prune."""
    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate of each round."""
    lr_schedule: LrSchedule = "cosine"
    """Path of the learning rate within a round; `cosine` and `constant` begin with the study's warm-up, `one_cycle` with its
    own."""

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
    uniform: bool = False
    budget: Budget = "uniform"
    owl_lambda: float = 0.0
    owl_m: float = 0.0
    mask_interval_steps: int = 0
    """0 where masks do not change while it fine-tunes."""
    sparsity: float | None = None
    """Fraction of the pattern's weights that is pruned at the end of the round; None in threshold mode."""
    threshold: float | None = None
    threshold_unit: ThresholdUnit = "absolute"
    mask_decay: float = 0.0
    drop_fraction: float = 0.0
    score_rate: float = 0.0
    score_penalty: float = 0.0
    gate_penalty: float = 0.0
    calibration_sequences: int = 0
    """0 where criterion and budget look at weights alone."""
    l1_lambda: float = 0.0
    layer_drop: float = 0.0
    trainable: Trainable = "all"
    group_lambda: float = 0.0
    distill_alpha: float = 0.0
    temperature: float = 1.0
    distill_hidden: float = 0.0
    learning_rate: float = 0.0
    lr_schedule: LrSchedule = "cosine"
    finetune_tokens: int = 0
    data_start_tokens: int = 0
    """Where in the endless stream of shuffled epochs this round's fine-tuning begins."""
    seed: int = 0
    """Seed of the data order; 0 where nothing is read."""


READ_BY = {"mask_interval_steps": ("gradual_magnitude", "sr_ste", "movement", "soft_movement", "l0", "rigl", "set"),
           "mask_decay": ("sr_ste",), "drop_fraction": ("rigl", "set"), "score_rate": ("soft_movement", "l0"),
           "score_penalty": ("soft_movement",), "gate_penalty": ("l0",),
           "calibration_sequences": ("wanda", "ria", "sparsegpt", "taylor", "contribution", "activation")}
"""Settings that these criteria alone read; calibration_sequences budget `owl` too."""
WHILE_TRAINING = ("l1_lambda", "group_lambda", "layer_drop", "trainable", "distill_alpha", "distill_hidden", "learning_rate",
                  "lr_schedule")
"""Settings that say nothing where nothing is fine-tuned."""


class Unhashed:
    """Marks a setting that says where something lies: no key hashes it, for what lies there is hashed instead."""


Place = Annotated[str, Unhashed()]


class ModelSettings(Frozen):
    path: Place
    """Folder of a Hugging Face causal language model, with its tokenizer."""
    prunable: Literal["matrices", "all"] = "matrices"
    """`matrices`: attention and MLP; `all` adds the embeddings (once, when tied)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the module's weights, in training, evaluation and export; masters are fp32. `auto` is the checkpoint's own;
    fp16 and fp64 become fp32, and that is said."""


class DataSettings(Frozen):
    corpus: Place | None = "builtin"
    """Text to fine-tune on and to hold out: "builtin", a file, folder or glob (.txt, .jsonl, .parquet), or a Hugging Face
    dataset name; None where nothing is fine-tuned."""
    text_field: Place = "text"
    """Where a row holds its text or its chat, in all formats but .txt; a chat is also found in `messages`."""
    context_tokens: int = Field(128, ge=2)
    epoch_tokens: int | None = Field(None, ge=1)
    """Tokens that count as one epoch; None is the whole train split."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the order of the text, and of the items that are drawn from it."""


class TrainingSettings(Frozen):
    batch_tokens: int = Field(1024, ge=2)
    """Tokens of one optimizer step, over all ranks."""
    weight_decay: float = Field(0.0, ge=0)
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    """Share of each round's steps in which the learning rate rises; it falls to a tenth along a half cosine after."""


class EvaluationSettings(Frozen):
    tasks: tuple[str, ...] = ("text", "last_word", "choice")
    """Evaluation tasks; text, last_word and choice are made from the corpus's held-out documents."""
    data_dir: Place | None = None
    """Folder with local files of the named tasks (lambada/test.jsonl, ...); None takes them from the hub."""
    num_items: int | None = Field(None, ge=1)
    """Items of each task and split; None is all."""
    num_report_items: int | None = Field(None, ge=1)
    """Of each task on the report split, where other than `num_items`. How near a pick with a confidence comes to its limit
    depends on these, and only the frontier is scored on them."""
    racing_level: float | None = Field(None, gt=0, lt=1)
    """Stop scoring a candidate on the selection split when a finished one that is no larger has the better objective;
    each such stop is wrong with at most this probability. None scores every candidate in full, and is the default:
    how many items a dominated candidate is scored on depends on what was finished before it."""


class SearchSettings(Frozen):
    """How a study is searched; no candidate's numbers depend on it."""

    objectives: tuple[str, ...] = ("num_nonzero", "text/bits_per_byte")
    """What the search improves: sizes, which go down, and qualities as task/metric on the selection split, each in its own
    direction. At least one of each; the first ones are those of figures and tables."""
    num_trials: int = Field(16, ge=1)
    max_concurrent: int = Field(1, ge=1)
    time_budget_s: float | None = Field(None, gt=0)
    gpu_hours: float | None = Field(None, gt=0)
    """No trial begins once the rounds of this study, those of earlier sweeps too, have taken so many hours of GPUs."""
    min_gain_per_gpu_hour: float | None = Field(None, gt=0)
    """No trial begins once each of the last 10 was expected to add less than this share of the hypervolume for an hour
    of GPUs (0.01 is 1 %), by the model that chooses forks."""
    sampler_seed: int = Field(0, ge=0, lt=2**32)
    sampler: Literal["ours", "tpe", "gp", "nsga2", "random"] = "ours"
    """What proposes trials: samplers of Optuna, which hear of every round that a configuration can say. `ours` is TPE for the
    first trials; then each is a fork, one round on a candidate of the frontier. All others propose whole configurations."""
    constraints: dict[str, float] = Field(default_factory=dict)
    """Of a size or a metric (task/metric, selection split) the worst that is wanted: {"stored_bytes": 1.2e9,
    "lambada/acc": 0.6}. The search looks for candidates that keep them; `pick` decides."""
    max_drop: dict[str, float] = Field(default_factory=dict)
    """Of a metric, how much it may lose against the dense model: accuracies in points (0.01), others in their own unit."""
    dense_control: bool = True
    """End with the longest trial's fine-tuning on the dense model: what pruned models gain from training alone."""

    @model_validator(mode="after")
    def _known_objectives(self) -> Self:
        sizes = [name for name in self.objectives if name in SIZES]
        for name in (*(name for name in (*self.objectives, *self.constraints) if name not in SIZES), *self.max_drop):
            higher_is_better(name)
        if not sizes or len(sizes) == len(self.objectives) or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives must be different names, at least one size ({', '.join(SIZES)}) and one quality "
                             f"(task/metric), got {', '.join(self.objectives) or 'none'}")
        return self

    @property
    def predicts_ms(self) -> bool:
        """Whether candidates' times are wanted, which costs the study some timing before its first trial."""
        return "predicted_ms" in (*self.objectives, *self.constraints)

    @property
    def size(self) -> str:
        return next(name for name in self.objectives if name in SIZES)

    @property
    def objective(self) -> str:
        return next(name for name in self.objectives if name not in SIZES)


class ClusterSettings(Frozen):
    """How fast and where; no key hashes it, and each round's provenance says it."""

    zero_stage: Literal[0, 1, 2, 3, "auto"] = 0
    num_ranks: int | Literal["auto"] = 1
    """Processes of one trial. `auto`, here and for zero_stage: the smallest that fit the GPUs' memory (placement.py);
    one rank at stage 0 on a CPU."""
    round_limit_s: float = Field(3600.0, gt=0)
    """A round that takes longer is taken for stuck: its gang is ended and started again, once, and then its trial fails
    with the stack of every rank."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=2)] = "auto"
    """Tokens of one rank that are in memory at a time: a step's gradients are added up over them. `auto`: the most that fit,
    by placement.py. Halved where memory runs out nevertheless, which the study remembers."""
    compile: Literal["auto"] | bool = "auto"
    """Train through torch.compile. `auto`: on a GPU where there is a C compiler."""
    wait_for_nodes_s: float = Field(600.0, gt=0)
    """How long a sweep waits where nodes were lost and no gang fits any more; then it ends, and the same command goes on."""
    gpus_per_rank: float = Field(0.0, ge=0)
    cpus_per_rank: float = Field(1.0, gt=0)


class ServingSettings(Frozen):
    """What `raysearch measure` times, and `predicted_ms` is the time of; no key hashes it."""

    batch_sequences: int = Field(8, ge=1)
    prompt_tokens: int = Field(96, ge=1)
    """Of each sequence; with `new_tokens` at most the model's context."""
    new_tokens: int = Field(32, ge=1)

    @property
    def tokens_at_once(self) -> tuple[int, int]:
        """In the forward pass that reads the prompts, and in one of decoding."""
        return self.batch_sequences * self.prompt_tokens, self.batch_sequences


class Study(Frozen):
    """What is fixed for all trials of one study: `STUDY` in a search space module."""

    model: ModelSettings
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    search: SearchSettings = SearchSettings()
    cluster: ClusterSettings = ClusterSettings()
    serving: ServingSettings = ServingSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        num_ranks = 1 if self.cluster.num_ranks == "auto" else self.cluster.num_ranks
        if num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, or auto, got {num_ranks}")
        if self.search.gpu_hours is not None and not self.cluster.gpus_per_rank:
            raise ValueError(f"gpu_hours {self.search.gpu_hours:g} limits nothing where gpus_per_rank is 0; give time_budget_s")
        sampler, num_gpus = self.search.sampler, self.cluster.gpus_per_rank
        if self.search.min_gain_per_gpu_hour is not None and (sampler != "ours" or not num_gpus):
            raise ValueError(f"min_gain_per_gpu_hour needs sampler ours, whose model expects gains, and gpus_per_rank above 0, "
                             f"got {sampler} and {num_gpus:g}; give num_trials or time_budget_s")
        per_step = self.data.context_tokens * num_ranks
        if self.training.batch_tokens % per_step:
            raise ValueError(f"batch_tokens must be a multiple of context_tokens * num_ranks = {per_step}, "
                             f"got {self.training.batch_tokens}")
        micro = self.cluster.micro_batch_tokens
        if micro != "auto" and (micro % self.data.context_tokens or self.training.batch_tokens // num_ranks % micro):
            raise ValueError(f"micro_batch_tokens must be a multiple of context_tokens = {self.data.context_tokens} that "
                             f"divides the {self.training.batch_tokens // num_ranks} tokens of a rank (batch_tokens / "
                             f"num_ranks), got {micro}")
        if self.evaluation.racing_level is not None and len(self.search.objectives) > 2:
            raise ValueError("racing_level needs one size and one quality in objectives, for a candidate that has lost by one "
                             f"quality may win by another, got {', '.join(self.search.objectives)}")
        if num_ranks > 1 and 0 < self.cluster.gpus_per_rank < 1:
            raise ValueError("gpus_per_rank below 1 needs num_ranks 1 (NCCL refuses two ranks on one GPU), "
                             f"got {self.cluster.gpus_per_rank} and {self.cluster.num_ranks}")
        return self

    def replaced(self, **settings: Any) -> "Study":
        """A copy with these settings, named as they are in their sections: replaced(num_ranks=2). Checked anew."""
        changed = self.model_dump()
        for name, value in settings.items():
            changed[SECTION_OF[name]][name] = value
        return parse(Study, changed, "study")


NUMBERS = ("model", "data", "training", "evaluation")
"""Sections that decide what a candidate's numbers are."""
SECTION_OF = {name: section for section, field in Study.model_fields.items()
              for name in cast(type[Frozen], field.annotation).model_fields}
"""Section of each setting; their names are different."""


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by their own names, the model's `path` by that of `model` too, in their sections; ValueError for a name that is
    none."""
    sections: dict[str, Any] = {}
    for name, value in settings.items():
        own = "path" if name == "model" else name
        if own not in SECTION_OF:
            raise ValueError(f"{name}: no such setting; the settings are {', '.join(SECTION_OF)}")
        sections.setdefault(SECTION_OF[own], {})[own] = value
    return {section: sections[section] for section in Study.model_fields if section in sections}


def study_of(**settings: Any) -> Study:
    """A study of settings by their own names: study_of(path="models/mine", num_trials=4)."""
    return parse(Study, nested(settings), "study")
