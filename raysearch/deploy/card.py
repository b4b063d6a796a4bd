"""The model card of a deployment folder."""

import json
from pathlib import Path
from typing import Any

from raysearch.config import Metric
from raysearch.study.records import Recovered, RoundRecord, SpeedRecord, StudyRecord, TrialRecord


def model_card(study: StudyRecord, record: RoundRecord, trial: TrialRecord | None, report: dict[str, Metric] | None,
               dense: dict[str, Metric] | None, is_plain: bool, recovered: Recovered | None = None,
               compacted: Any = None, speed: SpeedRecord | None = None) -> str:
    """README.md of the deployment folder: what it is, how it was made, what was measured, how to load it. `compacted` is a
    model out of which dead parts were cut."""
    metrics = report if report is not None else record.metrics
    split = "report split, which the search never saw" if report is not None else "selection split, which the search used"
    rows = [f"| {name} | {_cell(metric)} | {_cell((dense or {}).get(name))} | {metric.num_items} |"
            for name, metric in sorted(metrics.items())]
    loader = ("AutoModelForCausalLM.from_pretrained(FOLDER)  # from transformers" if is_plain
              else "raysearch.load(FOLDER)  # import raysearch")
    settings = json.dumps(_settings(trial), sort_keys=True)
    return "\n".join([
        "---", "library_name: transformers", "tags: [pruned, raysearch]", "---", "",
        f"# {Path(study.study.model.path).name}, pruned to {record.sparsity:.1%} sparsity", "",
        f"Candidate `{record.key}`, round {record.depth} of {trial.name if trial else 'trial -'}, of a raysearch study "
        f"of `{study.study.model.path}` (space `{study.space}`).", "", "## Size", "",
        "| number | value |", "|---|---|",
        f"| non-zero parameters | {record.num_nonzero:,} of {record.num_parameters:,} |",
        f"| sparsity of the prunable weights | {record.sparsity:.4f} |",
        f"| bytes stored, in the smallest format | {record.stored_bytes:,} |",
        f"| bytes in memory as plain matrices, without what can be cut out | {record.resident_bytes:,} |",
        *_compact_rows(compacted), *_speed_rows(speed), "",
        f"## Quality, on the {split}", "", "| metric | this model | dense model | items |", "|---|---|---|---|", *rows, "",
        "The standard errors are over the items." + (
            " The numbers are of weights that were lost: those here were computed again, on "
            f"{recovered.provenance.device} with {recovered.provenance.num_ranks} rank(s), and differ in bits "
            f"({recovered.num_nonzero:,} are not zero)."
            if recovered else ""), "", "## How it was made", "", f"Trial settings: `{settings}`", "",
        f"Corpus `{study.study.data.corpus}`, seed {study.study.data.seed}, {record.provenance.created_at}, "
        f"{record.provenance.device}, " + ", ".join(f"{k} {v}" for k, v in sorted(record.provenance.versions.items())) + ".",
        "", "## Load", "", "```python", f"model = {loader}", "```", "",
        "What pruning emptied is cut out." if compacted is not None else
        "Pruned weights are zeros: in the hf format they save neither memory nor time by themselves." if
        is_plain else "`raysearch.load` runs the model from its kept weights, on sparse kernels where some fit.", ""])


def _compact_rows(model: Any) -> list[str]:
    if model is None:
        return []
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return [f"| parameters of this compact form | {sum(parameter.numel() for parameter in model.parameters()):,} |",
            f"| bytes of this compact form, stored and resident, the file's header apart | {num_bytes:,} |"]


def _speed_rows(speed: SpeedRecord | None) -> list[str]:
    if speed is None:
        return []
    serving, served, dense = speed.serving, speed.served, speed.dense
    return [f"| scoring, tokens/s (dense beside it) | {served.scoring_tokens_per_s:,.0f} ({dense.scoring_tokens_per_s:,.0f}) |",
            f"| decoding, ms a step (dense beside it) | {served.decode_ms:.3g} ({dense.decode_ms:.3g}) |",
            f"| so measured on | {speed.provenance.device}, {serving.batch_sequences} sequences of {serving.prompt_tokens} "
            f"prompt and {serving.new_tokens} new tokens, form: {speed.form} |"]


def _settings(trial: TrialRecord | None) -> dict[str, object] | list[dict[str, object]]:
    """What the trial was asked: its configuration, or its actions where it has none, as a dense control."""
    if trial is None:
        return {}
    if trial.config is None:
        return [action.model_dump(exclude_defaults=True) for action in trial.actions]
    return trial.config.model_dump(exclude_none=True)


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return ""
    return f"{metric.value:.4f}" + ("" if metric.stderr is None else f" ± {metric.stderr:.4f}")
