"""Whether a deployment folder is what it claims to be: its files, what it was scored on, what it scores and how fast it is."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from raysearch.config import Study, higher_is_better
from raysearch.deploy.load import load
from raysearch.evaluation import Scorer, Task, evaluate, tasks_fingerprint
from raysearch.evaluation.speed import beside_dense, speeds
from raysearch.kernels.device import device_name
from raysearch.models.model import load_model, load_tokenizer, on_device
from raysearch.study.items import Items, form_of, read_items
from raysearch.study.records import Served, SpeedRecord
from raysearch.study.text import first_line
from raysearch.trial.inputs import read_tasks

ITEMS = "raysearch-items.npz"
"""In the folder: what the candidate scored on each item in its study."""
READ = ("*.json", "*.safetensors", "*.bin", "*.model", "*.spm", "*.tiktoken", "*.jinja", "*vocab*", "merges*")
"""What loaders look for."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
"""Of an item, beside 1: another device or batch adds in another order, and a logit of 20 in bfloat16 is known to 0.06.
books-30m in bfloat16, scored again in fp32: 0.039 at most (2026-11-27)."""
FLIPPED = {"float32": 0.02, "bfloat16": 0.1}
"""Share of the items, one at least, on which an answer may turn from right to wrong or back: where two are nearly even."""


SPEED_TOLERANCE = 0.25
"""Of a time over that of the dense model beside it. The milliseconds themselves double where others use the machine."""
NUM_RUNS = 5
"""Of the timing, until the fastest of each model are within the tolerance."""


class Compared(NamedTuple):
    """One metric of a folder, on the items that were scored now."""

    metric: str
    recorded: float
    found: float
    num_items: int
    num_differing: int
    """Items that are further apart than TOLERANCE."""
    may_differ: int


def verify(folder: Path, data_dir: str | None = None, corpus: str | None = None, limit: int | None = None) -> list[Compared]:
    """Scores an export again, on the first `limit` items of each task, and compares item by item with its study. `data_dir`
    and `corpus`: where the study's are now.

    ValueError of one sentence for a file that is damaged, missing or added, items that are not those it was scored on, and
    scores that are not those of the study."""
    if not (folder / "raysearch.json").is_file():
        raise ValueError(f"{folder}: raysearch.json is missing, so this is no export of raysearch")
    described = json.loads((folder / "raysearch.json").read_text())
    if not (evaluation := described.get("evaluation")):
        raise ValueError(f"{folder}: cannot be verified, for it was not scored: {described.get('not_scored', 'an old export')}")
    known = {*described["sha256"], "raysearch.json"}
    if added := sorted({file.name for pattern in READ for file in folder.glob(pattern)} - known):
        raise ValueError(f"{folder / added[0]}: is no part of the export, and loaders may read it; remove it")
    moved = {name: value for name, value in (("data_dir", data_dir), ("corpus", corpus)) if value is not None}
    study = Study.model_validate_json(json.dumps(evaluation["study"])).replaced(**moved)
    tasks = read_tasks(study)[evaluation["split"]]
    if tasks_fingerprint(tasks) != evaluation["tasks_sha256"]:
        raise ValueError(f"{folder}: the items of its tasks are not those that it was scored on; put the study's corpus "
                         f"({study.data.corpus}) and evaluation files ({study.evaluation.data_dir or 'of the hub'}) back, or "
                         "name them with --corpus and --data-dir")
    compared = rescore(folder, tasks, read_items(folder / ITEMS), limit)
    check(folder, compared)
    return compared


class Timed(NamedTuple):
    """A time over that of the dense model, beside it and in turn."""

    name: str
    recorded: float
    found: float


def verify_speed(folder: Path, say: Callable[[str], object]) -> list[Timed]:
    """Times an export again as `raysearch measure` did in its study, if that was on this device and the dense model is here;
    else [], and `say` gets why. ValueError of one sentence where scoring or decoding is off by more than SPEED_TOLERANCE after
    NUM_RUNS runs."""
    described = json.loads((folder / "raysearch.json").read_text())
    if not (claimed := described.get("speed")):
        say("its speed was not measured (raysearch measure), so none is claimed")
        return []
    recorded, device = SpeedRecord.model_validate(claimed), device_name("cuda" if torch.cuda.is_available() else "cpu")
    if device != recorded.provenance.device:
        say(f"its speed was measured on {recorded.provenance.device}, and this is {device}: it cannot be compared")
        return []
    settings = described["evaluation"]["study"]["model"]
    try:
        dense = on_device(load_model(settings["path"], getattr(torch, settings["dtype"])))
    except (OSError, ValueError) as error:
        say(f"its speed cannot be compared, for the dense model beside which it was measured is not here: {first_line(error)}")
        return []
    model = on_device(load(folder, backend="dense"))
    runs: list[Sequence[Served]] = []
    for _ in range(NUM_RUNS):
        runs.append(speeds([dense, model], **recorded.serving.model_dump()) if runs else
                    beside_dense(dense, model, recorded.serving, lambda line: None)[:2])
        decode_ms = [min(each.decode_ms for each in served) for served in zip(*runs)]
        tokens_per_s = [max(each.scoring_tokens_per_s for each in served) for served in zip(*runs)]
        timed = [Timed("decoding", recorded.served.decode_ms / recorded.dense.decode_ms, decode_ms[1] / decode_ms[0]),
                 Timed("scoring", recorded.dense.scoring_tokens_per_s / recorded.served.scoring_tokens_per_s,
                       tokens_per_s[0] / tokens_per_s[1])]
        if not (off := [each for each in timed if abs(math.log(each.found / each.recorded)) > math.log1p(SPEED_TOLERANCE)]):
            return timed
    raise ValueError(f"{folder}: is not as fast as its study recorded: {off[0].name} takes {off[0].found:.3g} of the dense "
                     f"model's time and took {off[0].recorded:.3g}, more than {SPEED_TOLERANCE:.0%} apart after {NUM_RUNS} "
                     "runs; its weights, its record or the kernels of this machine have changed")


def rescore(folder: Path, tasks: Sequence[Task], recorded: Mapping[str, Items], limit: int | None) -> list[Compared]:
    """The folder's model as it is deployed, on the first `limit` items of each task that were also recorded."""
    model = on_device(load(folder))
    found = evaluate(Scorer(model, load_tokenizer(str(folder))), tasks, limit=limit).items
    dtype = json.loads((folder / "raysearch.json").read_text())["dtype"]
    return [compare(metric, ours, recorded[metric], dtype) for metric, ours in found.items() if metric in recorded]


def compare(metric: str, found: Items, recorded: Items, dtype: str) -> Compared:
    """On the items that both have."""
    _, ours, theirs = np.intersect1d(found.item, recorded.item, return_indices=True)
    one, other = found.numerator[ours], recorded.numerator[theirs]
    is_answer = higher_is_better(metric)
    differing = np.abs(one - other) > (0.5 if is_answer else TOLERANCE[dtype] * (1 + np.abs(other)))
    weight = recorded.weight[theirs].sum()
    values = [float(form_of(metric).value(np.asarray(each.sum() / weight))) if weight else math.nan for each in (other, one)]
    return Compared(metric, *values, len(one), int(differing.sum()), max(1, int(FLIPPED[dtype] * len(one))) if is_answer else 0)


def check(folder: Path, compared: Sequence[Compared]) -> None:
    """ValueError unless all metrics are those of the study."""
    for each in compared:
        if each.num_differing > each.may_differ:
            raise ValueError(f"{folder}: does not score what its study recorded: {each.metric} is {each.found:.6g} and was "
                             f"{each.recorded:.6g}, {each.num_differing} of {each.num_items} items differ; its weights, its "
                             "tokenizer or the code that opens it have changed")


