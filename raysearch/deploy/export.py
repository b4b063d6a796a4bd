"""From a candidate to a deployment folder, and back: `export` writes it, `load` opens it.

Two formats. "dense" is a plain Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads: pruned weights are
stored as zeros, so it is as large as the dense model. "compressed" stores bitmaps and non-zero values and is as small as
the candidate's `stored_bytes`; `raysearch.load` opens it.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from raysearch.deploy.card import model_card
from raysearch.models.model import load_model, prunable_parameters
from raysearch.models.weights import read_weights, saving, to_store, write_weights
from raysearch.study.files import file_sha256, new_directory, write_json
from raysearch.study.ledger import WEIGHTS, Ledger
from raysearch.study.storage import as_file, location

KEPT = ("*token*.json", "*vocab*", "merges*", "*.model", "*.spm", "*.tiktoken", "tekken.json", "*.jinja",
        "additional_chat_templates/*", "generation_config.json", "LICENSE*", "NOTICE*")
"""What belongs to a model beside its weights and config.json: tokenizer, chat templates, settings of generation, terms."""
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
    model = load_model(study.study.model.path, getattr(torch, study.study.model.dtype))
    prunable = {p.name for p in prunable_parameters(model, study.study.model.prunable)}
    if record.action is not None:
        with as_file(ledger.weights_path(key)) as file:
            weights = read_weights(file, ledger.expected_sha256(record, WEIGHTS))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name].view_as(parameter))  # a vector with a mask comes as a matrix of one row
    num_nonzero, recovered = sum(int(p.count_nonzero()) for p in model.parameters()), ledger.recovered(key)
    expected = recovered.num_nonzero if recovered else record.num_nonzero
    if num_nonzero != expected:
        raise ValueError(f"candidate {key}: {num_nonzero} non-zero weights in {study.study.model.dtype} but "
                         f"{expected} in its record; its weights do not survive the rounding, so it is not exported")
    if (Path(study.study.model.path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig()  # transformers refuses to write some that it reads; it is copied
    with new_directory(out) as folder:
        if format == "dense":
            with saving(out):
                model.save_pretrained(folder)
        else:
            model.config.save_pretrained(folder)
            write_weights(folder / COMPRESSED, {name: to_store(tensor, tensor != 0 if name in prunable else None)
                                                for name, tensor in own_tensors(model).items()})
        copy_companions(Path(study.study.model.path), folder)
        trial = next((t for t in [*ledger.trials(), *ledger.controls()] if key in t.keys), None)
        (folder / "README.md").write_text(model_card(study, record, trial, ledger.report_metrics(record.key),
                                                     ledger.report_metrics(study.root_key), format, recovered))
        files = {file.relative_to(folder).as_posix(): file_sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}
        write_json(folder / "raysearch.json", {"key": key, "study": str(ledger.directory), "format": format,
                                               "record": record.model_dump(mode="json"), "sha256": files,
                                               "recovered": recovered.model_dump(mode="json") if recovered else None})
        if out.exists():  # the earlier export stays until the new one is whole
            shutil.rmtree(out)
    return out


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a file of the model holds: parameters, tied ones once, and the buffers that are no tables made anew."""
    stored = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{name: buffer for name, buffer in model.named_buffers() if name in stored}}


def copy_companions(model: Path, folder: Path) -> None:
    """As they are: a tokenizer that is loaded and saved may come out as another one."""
    for file in {file for pattern in KEPT for file in model.glob(pattern) if file.is_file()}:
        target = folder / file.relative_to(model)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
