"""What a study writes down: its own record, one for each round and each trial, and the keys that name them.

A round is named by its key, a hash of everything that determines it, so two trials with a common prefix share records.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import Field
from pydantic.fields import FieldInfo

from raysearch.config import NUMBERS, SIZES, Action, Metric, ServingSettings, Study, TrialConfig, Unhashed
from raysearch.frozen import Frozen

FORMAT = 3
"""Number of the format of keys and records. A study of another one is refused; see docs/how_it_works.md."""


class Provenance(Frozen):
    """Where and with what a number was made."""

    created_at: str
    """UTC, ISO 8601."""
    git_commit: str | None
    versions: dict[str, str]
    device: str
    hostname: str
    num_ranks: int | None = None
    zero_stage: int | None = None
    micro_batch_tokens: int | None = None
    compiled: bool | None = None
    num_threads: int | None = None
    """Of each rank. Equal bits are promised on the same device with the same gang and threads; None of a driver."""


class StudyRecord(Frozen):
    format: int = FORMAT
    """Of all records and keys of the study."""
    study: Study
    space: str
    """Import name of the search space module; "prune" for a single trial without search."""
    space_hash: str
    """Hash of what the space proposes (search.space.space_hash): an edited space is another study."""
    root_key: str
    """Key of the dense baseline's round record."""
    model_beside: str | None = None
    """The model's folder relative to a local study, where it is found when both were moved together."""
    provenance: Provenance


class RoundRecord(Frozen):
    """A candidate: the model after a round, its sizes, and its quality on the selection split."""

    key: str
    parent: str | None
    """Key of the round before; None for the dense baseline."""
    action: Action | None
    """None for the dense baseline."""
    depth: int
    """Rounds since the dense baseline, which has 0."""
    num_parameters: int
    """All parameters; tied weights count once."""
    num_prunable: int
    num_nonzero: int
    """Non-zero parameters among all of them."""
    sparsity: float
    """Zeros among the prunable weights."""
    model_sparsity: float
    """Zeros among all parameters."""
    layer_sparsity: dict[str, float]
    """Sparsity of each prunable tensor."""
    stored_bytes: int
    """Tensor bytes of the smallest export, its file's header apart: bitmaps and kept values where those are smaller than dense
    matrices, or the compact form."""
    resident_bytes: int
    """Tensor bytes in memory when it is served as plain matrices: those of the compact form where something can be cut out,
    else those of the dense model."""
    compact_parameters: int | None = None
    """Of the compact form; None where pruning emptied no layer, head or neuron."""
    predicted_ms: float | None = None
    """Of a batch of the study's `serving`, by the study's `Latency`; None where its search does not ask for it."""
    metrics: dict[str, Metric]
    """On the selection split, by "task/metric"."""
    dominated_by: str | None = None
    """Key of a candidate that is no larger and better, as a race on the objective found before all items were scored
    (Study.racing_level). The metrics are then those of the first items only and never final."""
    train_loss: float | None
    """Mean loss of the last tenth of the fine-tuning steps, nats per token; None without fine-tuning."""
    prune_s: float
    finetune_s: float
    evaluate_s: float
    weights_sha256: str | None
    """As they were first computed; `Recovered` where they were lost and came out with other bits."""
    items_sha256: str | None = None
    """Of items.selection.npz; None where nothing was scored, and in records of before it was kept."""
    provenance: Provenance


class ReportRecord(Frozen):
    """A candidate's quality on the report split."""

    key: str | None = None
    """The candidate's; None in records of before it was kept."""
    metrics: dict[str, Metric]
    items_sha256: str | None = None
    """Of items.report.npz."""


class Served(Frozen):
    """How fast one model was served."""

    scoring_tokens_per_s: float
    """Prompt tokens, of all sequences together."""
    decode_ms: float
    """Of a step, which gives every sequence a new token."""
    resident_bytes: int
    """Of its weights in memory, in whatever form they were served."""

    def batch_ms(self, serving: ServingSettings) -> float:
        """Of a batch: the prompts are read, then every sequence gets its new tokens."""
        return serving.tokens_at_once[0] / self.scoring_tokens_per_s * 1e3 + serving.new_tokens * self.decode_ms


Curve = tuple[tuple[float, float], ...]
"""(share of something that is there, time over the dense model's), by share."""


class Latency(Frozen):
    """Times of the dense model and of others like it with less in them, on which `predicted_ms` rests (trial/latency.py)."""

    serving: ServingSettings
    dense_ms: float
    """Of a batch (Served.batch_ms)."""
    neurons: Curve
    """By the share of the units that are in every MLP."""
    heads: Curve
    layer: float
    """What one layer takes besides its neurons and heads, over the dense model's time."""
    masked: dict[str, Curve]
    """By form, as trial/latency.py names them: by the density of all linear layers, on sparse kernels where those win."""
    provenance: Provenance


class SpeedRecord(Frozen):
    """A candidate's speed, cut down and on sparse kernels where those won, and the dense model's in the same process."""

    key: str
    serving: ServingSettings
    served: Served
    dense: Served
    dtype: str
    form: str
    """What was served, in words."""
    provenance: Provenance


class OtherRecord(Frozen):
    """A model that the study did not make, such as a quantised or a smaller one, scored on its items to stand beside the
    frontier."""

    name: str
    folder: str
    """Where it was."""
    num_parameters: int
    num_nonzero: int
    """Of the tensors as they are stored, also where one number of these stands for several weights."""
    stored_bytes: int
    """Tensor bytes of its files."""
    resident_bytes: int
    metrics: dict[str, dict[str, Metric]]
    """By split and "task/metric"."""
    provenance: Provenance
    speed: SpeedRecord | None = None
    """As it was opened, without cutting it down; None until `raysearch measure` timed it."""

    @property
    def key(self) -> str:
        return f"{OTHER}{self.name}"


OTHER = "other-"
"""Before the names of such models where keys of candidates stand."""


class Recovered(Frozen):
    """What a candidate lost and was computed again with other bits, as on another device or gang. Its record's numbers stay
    those of the first files."""

    sha256: dict[str, str]
    """File name -> hash."""
    num_nonzero: int
    """Of the weights that are there now."""
    provenance: Provenance


class MicroBatches(Frozen):
    """What fitted a gang's memory, where less did than was planned."""

    tokens: dict[str, int]
    """By the gang's device, number of ranks and ZeRO stage, in words."""


class JournalSeal(Frozen):
    """What the journal held when its driver last told it the end of a trial. Optuna only appends to it."""

    num_bytes: int
    sha256: str
    """Of its first `num_bytes`."""


class TrialRecord(Frozen):
    """What a trial was asked and what became of it. A dense control is one too, which the search never hears of."""

    number: int
    """From 0; a control's from -2 downwards, since -1 is that of the other jobs' logs."""
    config: TrialConfig | None
    """None for a control, for a fork, and where the trial was given as a list of actions."""
    actions: tuple[Action, ...]
    """Resolved before the trial ran, from the dense model on."""
    forked_at: int | None = None
    """Of a fork, how many of the first actions are those of the candidate on which it goes on; None of a whole trial."""
    gain_per_gpu_hour: float | None = None
    """Of a fork that a model chose, by how much of it the frontier's hypervolume was expected to grow; None on a CPU."""
    is_finish: bool = False
    """Made by `raysearch finish`: a fork that no search asked for."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """What Optuna sampled for `space`, by name; with `distributions` the journal can be made again from the records."""
    distributions: dict[str, str] = Field(default_factory=dict)
    """Optuna's JSON of what each parameter was drawn from."""
    keys: tuple[str, ...] = ()
    """Candidates finished so far, in order."""
    status: Literal["running", "done", "stopped", "failed"] = "running"
    reason: str | None = None
    """Why it stopped or failed, in one sentence."""
    traceback: str | None = None
    crashed: bool = False
    """It failed by an error or a death that says nothing about its configuration; a diverged trial did not."""
    log_path: str | None = None
    """What rank 0 printed; the other ranks' logs lie beside it."""
    started_at: str
    ended_at: str | None = None
    seconds: float = 0.0

    @property
    def is_control(self) -> bool:
        return self.number < -1

    @property
    def name(self) -> str:
        """For lines that people read."""
        return "control" if self.is_control else f"trial {self.number}"


NUM_POOR = 10
"""Trials in a row that are expected to give too little, until a search ends."""


def gives_little(gains: Sequence[float | None], least: float | None) -> str:
    """Why no further trial is worth its GPU-hours, from what those so far were expected to gain for one (None: no model said
    it) and from the least that is wanted; "" where one is."""
    poor = [gain for gain in gains[-NUM_POOR:] if gain is not None and least is not None and gain < least]
    if len(poor) < NUM_POOR:
        return ""
    return (f"each of the last {NUM_POOR} was expected to add less than {least:g} of the frontier's hypervolume for a GPU-hour "
            f"(at most {max(poor):.3g})")


def gpu_seconds(record: RoundRecord, gpus_per_rank: float) -> float:
    return gpus_per_rank * (record.provenance.num_ranks or 1) * (record.prune_s + record.finetune_s + record.evaluate_s)


def objective_values(record: RoundRecord, objectives: Sequence[str]) -> tuple[float, ...] | None:
    """What the search optimises of a candidate, each in its own unit and direction (config.is_maximised): its sizes, and its
    qualities on the selection split. None for one that lacks a metric, such as one whose scoring a race stopped."""
    values = [value_of(record, name) for name in objectives]
    return None if None in values else tuple(value for value in values if value is not None)


def value_of(record: RoundRecord, name: str) -> float | None:
    """Of a size or, on the selection split, a metric; None where the candidate lacks it."""
    if name in SIZES:
        size = getattr(record, name)
        return None if size is None else float(size)
    metric = record.metrics.get(name)
    return None if metric is None else metric.value


def hash_json(value: object) -> str:
    """First 16 hex digits of the sha256 of the canonical JSON of `value`."""
    digest = hashlib.sha256()
    for part in json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).iterencode(value):
        digest.update(part.encode())  # in parts: a value may be a whole corpus
    return digest.hexdigest()[:16]


def canonical(settings: Frozen) -> dict[str, Any]:
    """What a key hashes of settings: the fields that differ from their defaults and do not only say where something lies.

    So a new field changes no key while it has its default. Defaults are frozen for that: another default, or another
    meaning of a setting, needs another FORMAT.
    """
    fields: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if any(isinstance(mark, Unhashed) for mark in _marks(field)) or value == field.default:
            continue
        fields[name] = list(value) if isinstance(value, tuple) else value
    return fields


def _marks(field: FieldInfo) -> list[Any]:
    """Annotations of a field, those inside `X | None` too."""
    inner = [mark for part in get_args(field.annotation) for mark in get_args(part)[1:]]
    return [*field.metadata, *inner]


def settings_that_decide_numbers(study: Study) -> dict[str, dict[str, Any]]:
    return {section: canonical(getattr(study, section)) for section in NUMBERS}


def root_key(study: Study, contents: Sequence[str | None]) -> str:
    """Key of the dense baseline: the format, the settings that can change a number, and hashes of the contents of the model,
    the text and the items, wherever they lie."""
    return hash_json([FORMAT, settings_that_decide_numbers(study), list(contents)])


def round_key(parent_key: str, action: Action) -> str:
    """key(round) = hash(format, key(parent), canonical action); the root's key already covers model, data and settings."""
    return hash_json([FORMAT, parent_key, canonical(action)])


def config_hash(study: Study, actions: Sequence[Action]) -> str:
    """Of all that a trial will do: the driver's must be every rank's."""
    return hash_json([FORMAT, study.model_dump(mode="json"), [canonical(action) for action in actions]])
