"""How fast a study's frontier is: `raysearch measure`, a job of its own once the search has ended, on a machine for itself."""

from collections.abc import Callable

import torch

from raysearch.config import ServingSettings
from raysearch.deploy.load import candidate_model
from raysearch.evaluation.speed import speeds
from raysearch.kernels.device import device_name
from raysearch.models.model import load_model, on_device
from raysearch.models.sparse import Sparsified, sparsify_for_inference
from raysearch.search.retention import frontier_keys
from raysearch.study.files import persist, write_record
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import provenance
from raysearch.study.records import SpeedRecord
from raysearch.trial.round import recover_weights


def measure(directory: str, changes: dict[str, int], echo: Callable[[str], None]) -> int:
    """Times the dense model and each candidate of the frontier, dense beside it, by the study's `serving` settings with
    `changes`, and writes what it found into the candidate's folder; how many it timed.

    What was measured alike on this device stays. The study is locked, so that none of its trials runs beside it. ValueError
    where the prompt is longer than the model's context, and where the study has no frontier yet.
    """
    ledger = Ledger.open(directory)
    with ledger.lock():
        study = ledger.study().study
        serving = ServingSettings.model_validate(study.serving.model_dump() | changes)
        device = device_name("cuda" if torch.cuda.is_available() else "cpu")
        root_key, known = ledger.study().root_key, ledger.speeds()
        if not (keys := frontier_keys(ledger, study)):
            raise ValueError(f"{directory}: has no scored candidate, so there is nothing to measure; run its sweep first")
        due = [key for key in dict.fromkeys([root_key, *keys]) if key not in known or known[key].serving != serving
               or known[key].provenance.device != device]
        dense = on_device(load_model(study.model.path, getattr(torch, study.model.dtype)))
        for number, key in enumerate(due, start=1):
            recover_weights(ledger, key, echo)
            model = on_device(candidate_model(ledger, ledger.candidate(key)))
            num_tokens = (serving.batch_sequences * serving.prompt_tokens, serving.batch_sequences)
            form = in_words(sparsify_for_inference(model, num_tokens=num_tokens, say=echo))
            one, other = speeds([dense, model], **serving.model_dump())
            record = SpeedRecord(key=key, serving=serving, served=other, dense=one, form=form,
                                 dtype=str(model.dtype).removeprefix("torch."), provenance=provenance(device))
            path = ledger.speed_path(key)
            persist(path, lambda: write_record(path, record))  # noqa: B023  called at once
            echo(f"{number}/{len(due)}: candidate {key}, {form}: scoring {other.scoring_tokens_per_s:,.0f} tokens/s (dense "
                 f"{one.scoring_tokens_per_s:,.0f}), decoding {other.decode_ms:.3g} ms a step (dense {one.decode_ms:.3g}), "
                 f"{other.resident_bytes:,} bytes resident (dense {one.resident_bytes:,})")
    return len(due)


def in_words(done: Sparsified) -> str:
    """What `sparsify_for_inference` made of a model."""
    on_kernels = sorted({choice.backend for layer in done.layers for tokens, choice in layer.choices.items()
                         if done.model_ratio[tokens] > 1 and choice.backend != "dense"})
    parts = [f"{done.compaction.num_parameters:,} parameters cut out"] if done.compaction.num_parameters else []
    return ", ".join(parts + [f"kernel {name}" for name in on_kernels]) or "dense"
