"""`raysearch add`: a model of another origin, quantised or smaller, on a study's items, to stand beside its frontier."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from raysearch.deploy.load import open_other
from raysearch.evaluation import Scorer, evaluate
from raysearch.kernels.device import device_name
from raysearch.models.model import check_causal, load_tokenizer, vocab_size
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import provenance
from raysearch.study.records import OtherRecord
from raysearch.training.data import check_tokenizer
from raysearch.trial.inputs import read_inputs


def add(directory: str, folder: Path, name: str, echo: Callable[[str], None]) -> OtherRecord:
    """Scores the model in `folder`, whatever transformers or raysearch.load makes of it, on both splits with its own tokenizer,
    and writes others/NAME.json, in the place of an earlier one.

    ValueError of one sentence for a bad name, a study whose text and tasks are not here, or a model that cannot be scored."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"--name must be letters, digits, '.', '_' and '-', got {name!r}")
    ledger = Ledger.open(directory)
    study = ledger.study()
    inputs = read_inputs(study.study)
    if inputs.root_key != study.root_key or not study.study.evaluation.tasks:
        raise ValueError(f"{directory}: the files of its model, corpus or tasks are not those it was made with, or it has no "
                         "tasks, so nothing can be compared; put them back")
    model = open_other(folder)
    check_causal(model)
    tokenizer = load_tokenizer(str(folder))
    check_tokenizer(tokenizer, vocab_size(model.config))
    scored = {}
    for split, tasks in inputs.tasks.items():
        echo(f"scoring {name} on the {split} split")
        scored[split] = evaluate(Scorer(model, tokenizer), tasks)
    tensors = [*model.parameters(), *model.buffers()]
    record = OtherRecord(
        name=name, folder=str(folder.resolve()), num_parameters=sum(p.numel() for p in model.parameters()),
        num_nonzero=sum(int(torch.count_nonzero(p)) for p in model.parameters()), stored_bytes=tensor_bytes(folder),
        resident_bytes=sum(tensor.nbytes for tensor in tensors),
        metrics={split: evaluation.metrics for split, evaluation in scored.items()},
        provenance=provenance(device_name(model.device.type)))
    ledger.write_other(record, {split: evaluation.items for split, evaluation in scored.items()})
    return record


def tensor_bytes(folder: Path) -> int:
    """Of its .safetensors files, without their headers, whose length the first 8 bytes say."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            total += file.stat().st_size - 8 - int.from_bytes(handle.read(8), "little")
    return total
