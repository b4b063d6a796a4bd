"""How fast a study's frontier is: `raysearch measure`, a job of its own once the search has ended, on a machine for itself."""

from collections.abc import Callable
from pathlib import Path

import torch

from raysearch.config import ServingSettings
from raysearch.deploy.load import candidate_model, open_other
from raysearch.evaluation.speed import beside_dense, speeds
from raysearch.kernels.device import device_name
from raysearch.models.model import load_model, on_device
from raysearch.search.retention import frontier_keys
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import provenance
from raysearch.study.records import SpeedRecord
from raysearch.study.text import first_line
from raysearch.trial.round import recover_weights


def measure(directory: str, changes: dict[str, int], echo: Callable[[str], None]) -> int:
    """Times the dense model, each candidate of the frontier and each model that was added, dense beside it, by the study's
    `serving` settings with `changes`, and writes what it found beside their records; how many it timed.

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
        others = {other.key: other for other in ledger.others()}
        due = [key for key in dict.fromkeys([root_key, *keys, *others]) if key not in known or known[key].serving != serving
               or known[key].provenance.device != device]
        dense = on_device(load_model(study.model.path, getattr(torch, study.model.dtype)))
        num_left_out = 0
        for number, key in enumerate(due, start=1):
            if key in others:
                try:
                    model, form = open_other(Path(others[key].folder)), "as it is"
                except (OSError, ValueError) as error:
                    echo(f"{number}/{len(due)}: {key} is left out, for it cannot be opened: {first_line(error)}")
                    num_left_out += 1
                    continue
                one, served = speeds([dense, model], **serving.model_dump())
            else:
                recover_weights(ledger, key, echo)
                model = on_device(candidate_model(ledger, ledger.candidate(key)))
                one, served, form = beside_dense(dense, model, serving, echo)
            record = SpeedRecord(key=key, serving=serving, served=served, dense=one, form=form,
                                 dtype=str(model.dtype).removeprefix("torch."), provenance=provenance(device))
            if key in others:
                ledger.write_other(others[key].model_copy(update={"speed": record}), {})
            else:
                ledger.write(ledger.speed_path(key), record)
            name = key if key in others else f"candidate {key}"
            echo(f"{number}/{len(due)}: {name}, {form}: scoring {served.scoring_tokens_per_s:,.0f} tokens/s (dense "
                 f"{one.scoring_tokens_per_s:,.0f}), decoding {served.decode_ms:.3g} ms a step (dense {one.decode_ms:.3g}), "
                 f"{served.resident_bytes:,} bytes resident (dense {one.resident_bytes:,})")
    return len(due) - num_left_out
