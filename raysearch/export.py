"""From a candidate to a deployment folder, and back: `export` writes it, `load` opens it.

Two formats. "dense" is a plain Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads: pruned weights are
stored as zeros, so it is as large as the dense model. "compressed" stores bitmaps and non-zero values and is as small as
the candidate's `stored_bytes`; `raysearch.load` opens it.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raysearch.config import Metric
from raysearch.kernels import SparseLinear, SparseWeight
from raysearch.kernels.inference import linear_layers
from raysearch.ledger import Ledger, RoundRecord, StudyRecord, TrialRecord, file_sha256, new_directory, write_json
from raysearch.model import from_config, load_model, load_tokenizer, prunable_parameters, stored_dtype
from raysearch.storage import as_file, location
from raysearch.weights import read_sparse, read_weights, to_store, write_weights

COMPRESSED = "compressed.safetensors"


def export(ledger: Ledger, key: str, out: Path, format: str = "dense") -> Path:
    """Writes the candidate `key` of a study to the folder `out`, in the study's dtype, with a model card.

    An `out` that is an earlier export is replaced; anything else in its place is refused. Raises ValueError for an
    unknown format, a damaged weights file, and when what was written does not hold the candidate's zeros.
    """
    if format not in ("dense", "compressed"):
        raise ValueError(f"format must be dense or compressed, got {format!r}")
    out = location(out)
    if out.exists() and not (out / "raysearch.json").is_file():
        raise ValueError(f"{out}: exists and is no export of raysearch; give a new folder with --out")
    record, study = ledger.candidate(key), ledger.study()
    model = load_model(study.study.model, getattr(torch, study.study.dtype))
    prunable = {p.name for p in prunable_parameters(model, study.study.prunable)}
    if record.action is not None:
        with as_file(ledger.weights_path(key)) as file:
            weights = read_weights(file, record.weights_sha256)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    num_nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    if num_nonzero != record.num_nonzero:
        raise ValueError(f"candidate {key}: {num_nonzero} non-zero weights in {study.study.dtype} but {record.num_nonzero} "
                         "in its record; its weights do not survive the rounding, so it is not exported")
    with new_directory(out) as folder:
        load_tokenizer(study.study.model).save_pretrained(folder)
        if format == "dense":
            model.save_pretrained(folder)
        else:
            model.config.save_pretrained(folder)
            write_weights(folder / COMPRESSED, {name: to_store(parameter, name in prunable)
                                                for name, parameter in model.named_parameters()})
        trial = next((t for t in ledger.trials() if key in t.keys), None)
        (folder / "README.md").write_text(model_card(study, record, trial, ledger.report_metrics(record.key),
                                                     ledger.report_metrics(study.root_key), format))
        files = {file.name: file_sha256(file) for file in sorted(folder.iterdir())}
        write_json(folder / "raysearch.json", {"key": key, "study": str(ledger.directory), "format": format,
                                               "record": record.model_dump(mode="json"), "sha256": files})
        if out.exists():
            shutil.rmtree(out)
    return out


def load(folder: str | Path, backend: str = "sparse") -> PreTrainedModel:
    """The model of an exported folder of either format, every file checked against its recorded sha256.

    A compressed one runs from its kept weights, on sparse kernels where some fit and slab by slab elsewhere: the dense
    matrices are never made. `backend="dense"` makes them, as transformers would serve the model.
    """
    if backend not in ("sparse", "dense"):
        raise ValueError(f"backend must be sparse or dense, got {backend!r}")
    folder = Path(folder)
    manifest = folder / "raysearch.json"
    if not manifest.is_file():
        raise ValueError(f"{folder}: raysearch.json is missing, so this is no export of raysearch")
    described = json.loads(manifest.read_text())
    for name, sha256 in described["sha256"].items():
        if name != "README.md" and (not (folder / name).is_file() or file_sha256(folder / name) != sha256):
            raise ValueError(f"{folder / name}: is missing or differs from the recorded checksum; export it again")
    if described["format"] == "dense":
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    weights = read_sparse(folder / COMPRESSED, described["sha256"][COMPRESSED])
    dtype = next(weight.dtype for weight in weights.values() if isinstance(weight, Tensor))
    model = from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype)
    for name, parent, attribute, module in linear_layers(model):
        weight = weights.get(f"{name}.weight")
        if backend == "sparse" and isinstance(weight, SparseWeight):
            bias = weights.get(f"{name}.bias")
            weight = weight.transposed() if isinstance(module, Conv1D) else weight
            setattr(parent, attribute, SparseLinear(weight, bias if isinstance(bias, Tensor) else None))
    for name, parameter in list(model.named_parameters()):
        parent, _, attribute = name.rpartition(".")
        if (weight := weights.get(name)) is not None:  # else it is tied to another
            whole = weight.to_dense() if isinstance(weight, SparseWeight) else weight
            setattr(model.get_submodule(parent), attribute, torch.nn.Parameter(whole, requires_grad=parameter.requires_grad))
    model.tie_weights()
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{folder / COMPRESSED}: {missing[0]} is missing; export it again")
    return model.eval()


def open_model(path: str, backend: str = "sparse") -> PreTrainedModel:
    """The model of an exported folder, or of any Hugging Face one, on the GPU where there is one; on a CPU in fp32, which
    is faster there and more exact than bf16. `backend` as in `load`."""
    model = load(path, backend) if (Path(path) / COMPRESSED).is_file() else load_model(path, getattr(torch, stored_dtype(path)))
    if torch.cuda.is_available():
        return model.to("cuda")
    return model.float() if model.dtype == torch.bfloat16 else model


def model_card(study: StudyRecord, record: RoundRecord, trial: TrialRecord | None, report: dict[str, Metric] | None,
               dense: dict[str, Metric] | None, format: str) -> str:
    """README.md of the deployment folder: what it is, how it was made, what was measured, how to load it."""
    metrics = report if report is not None else record.metrics
    split = "report split, which the search never saw" if report is not None else "selection split, which the search used"
    rows = [f"| {name} | {_cell(metric)} | {_cell((dense or {}).get(name))} | {metric.num_items} |"
            for name, metric in sorted(metrics.items())]
    loader = ("AutoModelForCausalLM.from_pretrained(FOLDER)  # from transformers" if format == "dense"
              else "raysearch.load(FOLDER)  # import raysearch")
    made = json.dumps(trial.config.model_dump(exclude_none=True) if trial else {}, sort_keys=True)
    return "\n".join([
        "---", "library_name: transformers", "tags: [pruned, raysearch]", "---", "",
        f"# {Path(study.study.model).name}, pruned to {record.sparsity:.1%} sparsity", "",
        f"Candidate `{record.key}`, round {record.depth} of trial {trial.number if trial else '-'}, of a raysearch study "
        f"of `{study.study.model}` (space `{study.space}`).", "", "## Size", "",
        "| number | value |", "|---|---|",
        f"| non-zero parameters | {record.num_nonzero:,} of {record.num_parameters:,} |",
        f"| sparsity of the prunable weights | {record.sparsity:.4f} |",
        f"| bytes stored, compressed format | {record.stored_bytes:,} |",
        f"| bytes resident when transformers serves it, and stored in the dense format | {record.resident_bytes:,} |", "",
        f"## Quality, on the {split}", "", "| metric | this model | dense model | items |", "|---|---|---|---|", *rows, "",
        "The standard errors are over the items.", "", "## How it was made", "", f"Trial settings: `{made}`", "",
        f"Corpus `{study.study.corpus}`, seed {study.study.seed}, {record.provenance.created_at}, "
        f"{record.provenance.device}, " + ", ".join(f"{k} {v}" for k, v in sorted(record.provenance.versions.items())) + ".",
        "", "## Load", "", "```python", f"model = {loader}", "```", "",
        "Pruned weights are zeros: in the dense format they save neither memory nor time by themselves." if
        format == "dense" else "`raysearch.load` runs the model from its kept weights, on sparse kernels where some fit.", ""])


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return ""
    return f"{metric.value:.4f}" + ("" if metric.stderr is None else f" ± {metric.stderr:.4f}")
