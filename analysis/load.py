"""A study directory as one pandas frame: the only module here that reads the ledger's rounds and trials."""

import pandas as pd

from raysearch.config import SIZES, Metric, TrialConfig
from raysearch.study.collector import without_collector
from raysearch.study.damage import find_damage
from raysearch.study.ledger import Ledger, Split
from raysearch.study.records import OtherRecord, RoundRecord, SpeedRecord, TrialRecord
from raysearch.study.storage import AnyPath

Cell = str | int | float | bool | None
Reports = dict[str, dict[str, Metric]]
"""Metrics on the report split by key."""

HYPERPARAMETERS = tuple(TrialConfig.model_fields)
"""Columns with what was asked of the trial."""
SPLITS: tuple[Split, Split] = ("selection", "report")
SPEEDS = ("scoring_tokens_per_s", "decode_ms", "served_bytes")
"""Columns of what `raysearch measure` found; NaN where nothing was measured."""
LATENCIES = ("decode_of_dense", "scoring_of_dense")
"""Columns of what lies beside sizes: the time of a step of decoding, and of scoring, over that of the dense model in the same
process and in turn. The milliseconds of two that are served alike may differ by half where others share the machine."""
_INTEGERS = ("trial", "round", "num_rounds", "num_nonzero", "num_parameters", "stored_bytes", "resident_bytes",
             "finetune_tokens", "trained_tokens")
_FLOATS = ("initial_sparsity", "target_sparsity", "rate", "threshold", "l1_lambda", "finetune_epochs",
           "learning_rate", "action_sparsity", "action_threshold", "sparsity", "model_sparsity", "prune_s",
           "finetune_s", "evaluate_s", "seconds", "trial_seconds", "predicted_ms", *SPEEDS, *LATENCIES)
_OF_ALL = ("key", "num_nonzero", "num_parameters", "stored_bytes", "resident_bytes")
"""What is known of candidates and of models that were added."""
COLUMNS = ("trial", "round", "key", "forked_from", "status", "reason", "is_alias", "num_nonzero", "num_parameters", "sparsity",
           "model_sparsity", "stored_bytes", "resident_bytes", "predicted_ms", "dominated_by", *SPEEDS, *LATENCIES,
           *HYPERPARAMETERS,
           "action_sparsity", "action_threshold", "finetune_tokens", "trained_tokens", "action", "prune_s", "finetune_s",
           "evaluate_s", "seconds", "trial_seconds")


@without_collector()  # thousands of records that all stay: to walk them again and again takes a third of the seconds
def load(directory: str | AnyPath) -> pd.DataFrame:
    """One row per (trial, round), after one row for the dense baseline (trial NA, round 0, status "dense") and before one per
    round of each dense control (trial NA, status "control") and one per model that was added (trial NA, status "other").

    Beside COLUMNS, each metric gives `SPLIT/TASK/METRIC` and `SPLIT/TASK/METRIC_stderr` for the splits "selection"
    and "report", in the metric's own unit, NaN where it was not scored; the objective's columns are always there.

    * `status` and `reason` are those of the trial; a finished round of a failed trial is a valid candidate.
    * A trial without a finished round keeps one row, with round and key NA, so that no failure is lost.
    * `forked_from` says of a fork which candidate it goes on from ("trial 3 round 2"); its rounds are counted from the dense
      baseline on, and those before it are rows of the trials that made them.
    * `action` is what its round did, as JSON, for a trial that has no configuration: a fork, or one given as actions.
    * `is_alias` is True where an earlier row has the same key: the same model, computed once, shared by two trials.
    * `dominated_by` is set where a race stopped the scoring: the row's selection metrics are of some items, not final.
    * `finetune_tokens` are those of the round, `trained_tokens` those of all rounds since the dense baseline.
    * `predicted_ms` is that of a batch of the study's `serving` (records.Latency), where its search asks for it.
    * SPEEDS and LATENCIES are those of the form that was served, medians of one run beside the dense model (SpeedRecord); only
      what was measured as the newest was, on its device and by its `serving`: other times say nothing beside these.
    * `seconds` = prune_s + finetune_s + evaluate_s of the round (spent once for all aliases); `trial_seconds` is the
      whole trial, on each of its rows.
    * `attrs` holds "directory" (absolute), "model", "objective", "size", "objectives" (all of them) and "created_at" of the
      study, "device": those that its rounds ran on, the driver's before there is one, "speed": how SPEEDS were measured, ""
      where nothing was, and "damage": a sentence on each file that is damaged, missing or none of the study's. What cannot be
      read is left out.

    ValueError: no study there."""
    ledger = Ledger.open(directory)
    record = ledger.study()
    trials = [*ledger.trials(), *ledger.controls()]  # before the rounds: a running one then names none that is not read
    rounds, report_records = ledger.rounds(), ledger.report_records()
    reports = {key: report.metrics for key, report in report_records.items()}
    rows: list[dict[str, Cell]] = []
    if record.root_key in rounds:
        rows.append({"round": 0, "status": "dense", "trained_tokens": 0, **_round_cells(rounds[record.root_key], reports)})
    makers: dict[str, str] = {}
    for trial in trials:
        makers |= {key: f"{trial.name} round {number}" for number, key in enumerate(trial.keys, start=1) if key not in makers}
        rows.extend(_trial_rows(trial, rounds, reports, makers))
    rows.extend(_other_cells(other) for other in ledger.others())
    search = record.study.search
    columns = {f"{split}/{name}{end}" for name in search.objectives if name not in SIZES for split in SPLITS
               for end in ("", "_stderr")}
    columns |= {name for row in rows for name in row} - set(COLUMNS)
    metrics = sorted(columns, key=lambda name: (list(map(str, SPLITS)).index(name.partition("/")[0]), name))
    frame = pd.DataFrame(rows, columns=[*COLUMNS, *metrics])
    frame = frame.astype({"dominated_by": "object", **dict.fromkeys(_INTEGERS, "Int64"),
                          **dict.fromkeys((*_FLOATS, *metrics), "float64")})
    frame["is_alias"] = frame["key"].notna() & frame["key"].duplicated()
    speeds, how_measured = _measured_alike(ledger.speeds())
    for key, speed in speeds.items():
        frame.loc[frame["key"] == key, [*SPEEDS, *LATENCIES]] = [
            *speed.served.model_dump().values(), speed.served.decode_ms / speed.dense.decode_ms,
            speed.dense.scoring_tokens_per_s / speed.served.scoring_tokens_per_s]
    frame = frame.copy()  # its 72 blocks become 23, and every selection of rows is as much faster
    devices = sorted({candidate.provenance.device for candidate in rounds.values()}) or [record.provenance.device]
    frame.attrs.update(directory=str(ledger.directory), model=record.study.model.path, objective=search.objective,
                       size=search.size, objectives=search.objectives, device=", ".join(devices), speed=how_measured,
                       created_at=record.provenance.created_at,
                       damage=tuple(each.what for each in find_damage(ledger, trials, rounds, report_records)))
    return frame


def metric_names(frame: pd.DataFrame, split: str) -> list[str]:
    """Metrics ("task/metric") that have at least one value on `split`."""
    columns = [name for name in map(str, frame) if name.startswith(f"{split}/") and not name.endswith("_stderr")]
    return [name.partition("/")[2] for name in columns if frame[name].notna().any()]


def _measured_alike(speeds: dict[str, SpeedRecord]) -> tuple[dict[str, SpeedRecord], str]:
    """(those that were measured as the newest was, what that was in words)."""
    if not speeds:
        return {}, ""
    newest = max(speeds.values(), key=lambda speed: speed.provenance.created_at)
    serving, device = newest.serving, newest.provenance.device
    alike = {key: speed for key, speed in speeds.items() if (speed.serving, speed.provenance.device) == (serving, device)}
    left_out = (f"; {len(speeds) - len(alike)} measured otherwise before are left out: raysearch measure times what is on the "
                "frontier again" if len(alike) < len(speeds) else "")
    return alike, (f"{serving.batch_sequences} sequences of {serving.prompt_tokens} prompt and {serving.new_tokens} new tokens "
                   f"on {device}{left_out}")


def _trial_rows(trial: TrialRecord, rounds: dict[str, RoundRecord], reports: Reports, makers: dict[str, str]
                ) -> list[dict[str, Cell]]:
    common: dict[str, Cell] = {"trial": None if trial.is_control else trial.number,
                               "status": "control" if trial.is_control else trial.status, "reason": trial.reason,
                               "trial_seconds": trial.seconds, **(trial.config.model_dump() if trial.config else {})}
    if trial.forked_at is not None and len(trial.keys) >= trial.forked_at:
        common["forked_from"] = makers[trial.keys[trial.forked_at - 1]] if trial.forked_at else "the dense model"
    rows: list[dict[str, Cell]] = []
    trained_tokens = 0
    for number, (key, action) in enumerate(zip(trial.keys, trial.actions), start=1):
        trained_tokens += action.finetune_tokens
        if key in rounds and number > (trial.forked_at or 0):
            done = None if trial.config or trial.is_control else action.model_dump_json(exclude_defaults=True)
            rows.append({**common, "round": number, "trained_tokens": trained_tokens, "action": done,
                         **_round_cells(rounds[key], reports)})
    return rows or [common]


def _round_cells(record: RoundRecord, reports: Reports) -> dict[str, Cell]:
    cells: dict[str, Cell] = {name: getattr(record, name) for name in (
        *_OF_ALL, "sparsity", "model_sparsity", "predicted_ms", "dominated_by", "prune_s", "finetune_s", "evaluate_s")}
    cells["seconds"] = record.prune_s + record.finetune_s + record.evaluate_s
    if record.action is not None:
        cells |= {"action_sparsity": record.action.sparsity, "action_threshold": record.action.threshold,
                  "finetune_tokens": record.action.finetune_tokens}
    return cells | _metric_cells("selection", record.metrics) | _metric_cells("report", reports.get(record.key, {}))


def _other_cells(other: OtherRecord) -> dict[str, Cell]:
    zeros = 1 - other.num_nonzero / other.num_parameters
    cells: dict[str, Cell] = {"round": 0, "status": "other", "sparsity": zeros, "model_sparsity": zeros,
                              **{name: getattr(other, name) for name in _OF_ALL}}
    for split, metrics in other.metrics.items():
        cells |= _metric_cells(split, metrics)
    return cells


def _metric_cells(split: str, metrics: dict[str, Metric]) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for name, metric in sorted(metrics.items()):
        cells[f"{split}/{name}"] = metric.value
        cells[f"{split}/{name}_stderr"] = metric.stderr
    return cells
