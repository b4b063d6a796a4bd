"""Opening a deployment folder, of any format."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raysearch.kernels import SparseWeight
from raysearch.models.compact import cut_to
from raysearch.models.model import from_config, load_config, load_model, model_folder, on_device, stored_dtype
from raysearch.models.sparse import SparseLinear, linear_layers
from raysearch.models.weights import read_sparse, read_weights
from raysearch.study.files import file_sha256
from raysearch.study.ledger import WEIGHTS, Ledger
from raysearch.study.records import RoundRecord
from raysearch.study.storage import as_file
from raysearch.study.text import first_line

OWN_FILE = "raysearch.safetensors"


def load(folder: str | Path, backend: str = "sparse") -> PreTrainedModel:
    """The model of an exported folder of any format, every file checked against its recorded sha256.

    A sparse one runs from its kept weights, on sparse kernels where some fit and slab by slab elsewhere: the dense
    matrices are never made. `backend="dense"` makes them, as transformers would serve the model.
    """
    if backend not in ("sparse", "dense"):
        raise ValueError(f"backend must be sparse or dense, got {backend!r}")
    folder = Path(folder)
    manifest = folder / "raysearch.json"
    if not manifest.is_file():
        raise ValueError(f"{folder}: raysearch.json is missing, so this is no export of raysearch")
    described = json.loads(manifest.read_text())
    for name, sha256 in described["sha256"].items():  # a model card may be edited
        if name != "README.md" and (not (folder / name).is_file() or file_sha256(folder / name) != sha256):
            raise ValueError(f"{folder / name}: is missing or differs from the recorded checksum; export it again")
    if OWN_FILE not in described["sha256"]:
        return load_model(str(folder), getattr(torch, stored_dtype(str(folder))))
    weights = read_sparse(folder / OWN_FILE, described["sha256"][OWN_FILE])
    dtype = next(weight.dtype for weight in weights.values() if isinstance(weight, Tensor) and weight.is_floating_point())
    model = from_config(load_config(str(folder)), dtype)
    if kept := described.get("kept"):
        cut_to(model, kept)
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
            whole = whole.view_as(parameter)  # of experts all matrices stand below each other
            setattr(model.get_submodule(parent), attribute, torch.nn.Parameter(whole, requires_grad=parameter.requires_grad))
    for name, buffer in model.named_buffers():
        if isinstance(stored := weights.get(name), Tensor):
            buffer.copy_(stored)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.tie_weights()
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{folder / OWN_FILE}: {missing[0]} is missing; export it again")
    return model.eval()


def candidate_model(ledger: Ledger, record: RoundRecord) -> PreTrainedModel:
    """A candidate in its study's dtype, on the CPU, with zeros for what is pruned. ValueError for a damaged weights file."""
    settings = ledger.study().study.model
    model = load_model(settings.path, getattr(torch, settings.dtype))
    if record.action is not None:
        with as_file(ledger.weights_path(record.key)) as file:
            weights = read_weights(file, ledger.expected_sha256(record, WEIGHTS))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name].view_as(parameter))  # a vector with a mask comes as a matrix of one row
    return model


def open_model(path: str, backend: str = "sparse") -> PreTrainedModel:
    """The model of an exported folder, or of any Hugging Face one, `on_device`. `backend` as in `load`."""
    return on_device(load(path, backend) if (Path(path) / OWN_FILE).is_file() else
                     load_model(path, getattr(torch, stored_dtype(path))))


def open_other(folder: Path) -> PreTrainedModel:
    """An export, a Hugging Face folder, or one that brings its own quantisation, which transformers alone understands."""
    if (folder / "raysearch.json").is_file():
        return on_device(load(folder))
    if "quantization_config" not in json.loads((model_folder(str(folder)) / "config.json").read_text()):
        return open_model(str(folder))
    try:
        return AutoModelForCausalLM.from_pretrained(folder, device_map="cuda" if torch.cuda.is_available() else "cpu").eval()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"model {folder}: its quantised weights cannot be opened here ({first_line(error)})") from error
