"""From a candidate to a deployment folder, and back: `export` writes it, `load` opens it.

Three formats. "hf" is a plain Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads: pruned weights are
stored as zeros, so it is as large as the dense model. "sparse" stores bitmaps and non-zero values and is as small as
the candidate's `stored_bytes`; `raysearch.load` opens it. "compact" stores what is left when dead layers, heads and neurons are
cut out: a plain, smaller Hugging Face folder where layers stay alike and the family's configuration can say it, and else a file
that `raysearch.load` opens. Each is opened, compared and scored again before it is called done.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from raysearch.deploy.card import model_card
from raysearch.deploy.load import OWN_FILE, candidate_model, load
from raysearch.deploy.verify import ITEMS, check, rescore
from raysearch.evaluation import Task, tasks_fingerprint
from raysearch.models.compact import MULTIPLE, Kept, are_close, compact, few_logits, plain_config
from raysearch.models.model import prunable_parameters
from raysearch.models.weights import saving, to_store, write_weights
from raysearch.study.files import file_sha256, new_directory, write_json
from raysearch.study.items import write_items
from raysearch.study.ledger import Ledger, Split
from raysearch.study.storage import location
from raysearch.training.corpus import quiet
from raysearch.trial.inputs import read_inputs

KEPT = ("*token*.json", "*vocab*", "merges*", "*.model", "*.spm", "*.tiktoken", "tekken.json", "*.jinja",
        "additional_chat_templates/*", "generation_config.json", "LICENSE*", "NOTICE*")
"""What belongs to a model beside its weights and config.json: tokenizer, chat templates, settings of generation, terms."""
SPLITS: tuple[Split, Split] = ("report", "selection")
NUM_RESCORED = 32
"""Items of each task on which what was written is scored again; `raysearch verify` takes all."""


def export(ledger: Ledger, key: str, out: Path, format: str = "hf", echo: Callable[[str], None] = quiet) -> Path:
    """Writes the candidate `key` of a study to the folder `out`, in the study's dtype, with a model card and what it scored.

    An `out` that is an earlier export is replaced; anything else in its place is refused. Raises ValueError for an unknown
    format, a damaged weights file, and when what was written does not hold the candidate's zeros or scores otherwise than in
    its study. Where the study's text and tasks are not here, `echo` says that it was not scored.
    """
    if format not in ("hf", "sparse", "compact"):
        raise ValueError(f"format must be hf, compact or sparse, got {format!r}")
    out = location(out)
    if out.exists() and not (out / "raysearch.json").is_file():
        raise ValueError(f"{out}: exists and is no export of raysearch; give a new folder with --out")
    record, study = ledger.candidate(key), ledger.study()
    model = candidate_model(ledger, record)
    prunable = {p.name for p in prunable_parameters(model, study.study.model.prunable)}
    num_nonzero, recovered = sum(int(p.count_nonzero()) for p in model.parameters()), ledger.recovered(key)
    expected = recovered.num_nonzero if recovered else record.num_nonzero
    if num_nonzero != expected:
        raise ValueError(f"candidate {key}: {num_nonzero} non-zero weights in {study.study.model.dtype} but "
                         f"{expected} in its record; its weights do not survive the rounding, so it is not exported")
    if (Path(study.study.model.path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig()  # transformers refuses to write some that it reads; it is copied
    split, items = next(((split, items) for split in SPLITS if (items := ledger.items(key, split))), (SPLITS[0], {}))
    tasks, reason = _tasks(ledger, split) if items else ([], "the study has no tasks")
    kept, is_plain, logits = {}, format == "hf", None
    if format == "compact":
        kept, is_plain, logits = _cut(model, key)
    with new_directory(out) as folder:
        if is_plain:
            with saving(out):
                model.save_pretrained(folder)
        else:
            model.config.save_pretrained(folder)
            write_weights(folder / OWN_FILE, {name: to_store(
                tensor, tensor != 0 if name in prunable and format == "sparse" else None)
                                                for name, tensor in own_tensors(model).items()})
        copy_companions(Path(study.study.model.path), folder)
        speed = ledger.speeds().get(key)
        trial = next((t for t in [*ledger.trials(), *ledger.controls()] if key in t.keys), None)
        (folder / "README.md").write_text(model_card(study, record, trial, ledger.report_metrics(record.key),
                                                     ledger.report_metrics(study.root_key),
                                                     is_plain, recovered, model if format == "compact" else None, speed))
        if items:
            write_items(folder / ITEMS, items)
        files = {file.relative_to(folder).as_posix(): file_sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}
        evaluation = {"split": split, "study": study.study.model_dump(mode="json"), "tasks_sha256": tasks_fingerprint(tasks)}
        write_json(folder / "raysearch.json", {"key": key, "study": str(ledger.directory), "format": format, "kept": kept,
                                               "dtype": study.study.model.dtype,
                                               "evaluation": evaluation if tasks else None, "not_scored": reason,
                                               "record": record.model_dump(mode="json"), "sha256": files,
                                               "recovered": recovered.model_dump(mode="json") if recovered else None,
                                               "speed": speed.model_dump(mode="json") if speed else None})
        _check(folder, model, logits)
        if tasks:
            compared = rescore(folder, tasks, items, NUM_RESCORED)
            check(out, compared)
            echo(f"opened and scored again, {max((each.num_items for each in compared), default=0)} items of each task")
        else:
            echo(f"opened, not scored again: {reason}")
        if out.exists():  # the earlier export stays until the new one is whole
            shutil.rmtree(out)
    return out


def _tasks(ledger: Ledger, split: Split) -> tuple[Sequence[Task], str | None]:
    """(the study's tasks, None), or ([], why they are not to be had)."""
    study = ledger.study()
    try:
        inputs = read_inputs(study.study)
    except (ValueError, OSError) as error:
        return [], str(error)
    if inputs.root_key != study.root_key:
        return [], "the files of the model, its tokenizer, the corpus or the tasks are not those of the study"
    return inputs.tasks[split], None


def _cut(model: Any, key: str) -> tuple[Kept, bool, Tensor]:
    """Cuts out what is dead: (what stays of modules where stock loaders cannot tell, if they can, logits).
    ValueError where nothing can go."""
    reasons: list[str] = []
    logits = few_logits(model)
    cut = compact(model, reasons.append)
    if not cut.num_parameters:
        none = f"it has no dead layer, head or neuron, or fewer than {MULTIPLE} neurons, whose number stays a multiple of that"
        instead = "" if reasons else ", or prune with pattern head or neuron"  # which would stay in as well
        raise ValueError(f"candidate {key}: {(reasons or [none])[0]}; give format sparse{instead}")
    config = plain_config(model)
    if config is None:
        return cut.kept, False, logits
    model.config = config
    return {}, True, logits


def _check(folder: Path, model: nn.Module, logits: Tensor | None) -> None:
    """RuntimeError unless the folder opens as the model, with the masked model's logits where these are given."""
    found = load(folder, backend="dense")
    own, others = own_tensors(model), own_tensors(found)
    differing = [name for name in own.keys() | others.keys()
                 if name not in own or name not in others or not torch.equal(own[name], others[name])]
    if differing or (logits is not None and not are_close(few_logits(found), logits, found.dtype)):
        raise RuntimeError(f"the export does not open as the candidate ({sorted(differing)[:1] or 'other logits'}); nothing "
                           "was written; report it with the model's config.json")


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
