"""What a deployment folder claims is checked by its files, its items and its scores."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Run
from safetensors.torch import load_file, save_file

from analysis.constraints import Constraint
from analysis.load import load as load_study
from analysis.pick import pick, write_pick
from raysearch.config import ServingSettings
from raysearch.deploy.export import export
from raysearch.deploy.load import candidate_model, load
from raysearch.deploy.verify import ITEMS, compare, verify, verify_speed
from raysearch.evaluation.speed import beside_dense
from raysearch.kernels import device_name
from raysearch.models.model import load_model
from raysearch.study.files import file_sha256, write_record
from raysearch.study.items import Items
from raysearch.study.provenance import provenance
from raysearch.study.records import RoundRecord, SpeedRecord, TrialRecord
from raysearch.trial.worker import Worker


@pytest.fixture
def deployed(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> Path:
    return export(worker.ledger, candidate.key, tmp_path / "deployed", "hf")


def sealed_again(folder: Path) -> None:
    """As by somebody who writes the checksums of a changed folder."""
    described = json.loads((folder / "raysearch.json").read_text())
    described["sha256"] = {name: file_sha256(folder / name) for name in described["sha256"]}
    (folder / "raysearch.json").write_text(json.dumps(described))


@pytest.mark.parametrize("format", ["hf", "sparse"])
def test_an_export_is_what_it_claims(worker: Worker, candidate: RoundRecord, tmp_path: Path, format: str) -> None:
    said: list[str] = []
    folder = export(worker.ledger, candidate.key, tmp_path / "out", format, said.append)
    assert said == ["opened and scored again, 4 items of each task"]
    compared = verify(shutil.move(folder, tmp_path / "moved"))
    assert {each.metric for each in compared} >= {"text/bits_per_byte", "last_word/acc"}
    report = worker.ledger.report_metrics(candidate.key)
    assert report is not None
    for each in compared:
        assert each.recorded == pytest.approx(report[each.metric].value)
        assert each.found == pytest.approx(each.recorded, rel=1e-5)
        assert (each.num_items, each.num_differing) == (1 if each.metric.startswith("text") else 4, 0)


def test_a_changed_weight_is_found(deployed: Path) -> None:
    weights = load_file(deployed / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"] *= 1.1
    save_file(weights, deployed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors: is missing or differs from the recorded checksum"):
        verify(deployed)
    sealed_again(deployed)
    with pytest.raises(ValueError, match=r"does not score what its study recorded: .*items differ; its weights"):
        verify(deployed)


def test_another_tokenizer_is_found(deployed: Path) -> None:
    path = deployed / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"\x00":').replace('"b":', '"a":').replace('"\\u0000":', '"b":'))
    with pytest.raises(ValueError, match=r"tokenizer.json: is missing or differs from the recorded checksum"):
        verify(deployed)
    (deployed / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vocab.json: is no part of the export, and loaders may read it"):
        verify(deployed)


def test_a_changed_evaluation_file_is_found(deployed: Path, stories: Path, tmp_path: Path) -> None:
    changed = tmp_path / "stories.txt"
    changed.write_text(stories.read_text().replace("house", "horse"))
    with pytest.raises(ValueError, match="the items of its tasks are not those that it was scored on; put the study's corpus"):
        verify(deployed, corpus=str(changed))
    same = tmp_path / "copy.txt"
    shutil.copyfile(stories, same)
    assert {each.metric: each.num_items for each in verify(deployed, corpus=str(same), limit=2)}["last_word/acc"] == 2


def test_scores_that_were_written_over_are_found(deployed: Path) -> None:
    content = dict(np.load(deployed / ITEMS))
    content["text/bits_per_byte/numerator"] = content["text/bits_per_byte/numerator"] * 0.9
    np.savez_compressed(deployed / ITEMS, **content)
    sealed_again(deployed)
    with pytest.raises(ValueError, match="text/bits_per_byte is .* and was .*1 of 1 items differ"):
        verify(deployed)


def test_a_folder_without_scores(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="raysearch.json is missing, so this is no export of raysearch"):
        verify(tiny_model)


def test_an_export_far_from_its_data_says_that_it_was_not_scored(
        worker: Worker, candidate: RoundRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.deploy.export.read_inputs", lambda study: (_ for _ in ()).throw(ValueError("no such file")))
    said: list[str] = []
    folder = export(worker.ledger, candidate.key, tmp_path / "out", "hf", said.append)
    assert said == ["opened, not scored again: no such file"]
    with pytest.raises(ValueError, match="cannot be verified, for it was not scored: no such file"):
        verify(folder)


def test_an_answer_may_flip_and_a_likelihood_may_round() -> None:
    n = np.arange(100)
    right = Items((n % 2).astype(float), np.ones(100), n.astype(np.uint64), n)
    flipped = right._replace(numerator=np.where(n < 3, 1 - right.numerator, right.numerator))
    found = compare("task/acc", flipped, right, "float32")
    assert (found.num_differing, found.may_differ, found.num_items) == (3, 2, 100)
    nats = right._replace(numerator=n + 1.0)
    assert compare("task/perplexity", nats._replace(numerator=nats.numerator * 1.0005), nats, "float32").num_differing == 0
    assert compare("task/perplexity", nats._replace(numerator=nats.numerator * 1.01), nats, "float32").num_differing > 50
    assert compare("task/perplexity", nats._replace(numerator=nats.numerator * 1.04), nats, "bfloat16").num_differing == 0
    assert compare("task/acc", flipped, right, "bfloat16").may_differ == 10
    few = Items(*(each[90:] for each in right))
    assert compare("task/acc", few, right, "float32").num_items == 10


@pytest.fixture
def measured(worker: Worker, candidate: RoundRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An export whose candidate was measured here."""
    dense = load_model(worker.study.model.path, torch.float32)
    serving = ServingSettings(batch_sequences=2, prompt_tokens=24, new_tokens=4)
    monkeypatch.setattr("raysearch.deploy.verify.SPEED_TOLERANCE", 4.0)  # of a model whose steps are those of the clock's noise
    one, other, form = beside_dense(dense, candidate_model(worker.ledger, candidate), serving, str)
    write_record(worker.ledger.speed_path(candidate.key), SpeedRecord(
        key=candidate.key, serving=serving, served=other, dense=one, form=form, dtype="float32",
        provenance=provenance(device_name("cpu"))))
    yield export(worker.ledger, candidate.key, tmp_path / "measured", "hf")
    worker.ledger.speed_path(candidate.key).unlink()


def claim(folder: Path, **changes: Any) -> None:
    described = json.loads((folder / "raysearch.json").read_text())
    for path, value in changes.items():
        *parents, name = path.split("__")
        place = described["speed"]
        for parent in parents:
            place = place[parent]
        place[name] = value
    (folder / "raysearch.json").write_text(json.dumps(described))


def test_a_speed_is_measured_again_beside_dense(measured: Path) -> None:
    said: list[str] = []
    assert "| decoding, ms a step (dense beside it) |" in (measured / "README.md").read_text()
    assert [each.name for each in verify_speed(measured, said.append)] == ["decoding", "scoring"]
    assert said == []
    recorded = json.loads((measured / "raysearch.json").read_text())["speed"]
    for name, unit in (("decode_ms", "decoding"), ("scoring_tokens_per_s", "scoring")):
        claim(measured, **{f"served__{name}": recorded["dense"][name] * (0.02 if unit == "decoding" else 50)})
        with pytest.raises(ValueError, match=f"is not as fast as its study recorded: {unit} takes .* of the dense model's time "
                                             "and took 0.02, more than 400% apart in 3 runs"):
            verify_speed(measured, said.append)
        claim(measured, **{f"served__{name}": recorded["served"][name]})


def test_a_model_that_became_slower_is_found(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(folder: Path, backend: str) -> Any:
        model = load(folder, backend)
        model.transformer.h[0].mlp.register_forward_hook(lambda *given: time.sleep(0.01))
        return model

    monkeypatch.setattr("raysearch.deploy.verify.load", slow)
    monkeypatch.setattr("raysearch.deploy.verify.NUM_RUNS", 1)
    monkeypatch.setattr("raysearch.deploy.verify.SPEED_TOLERANCE", 0.25)
    with pytest.raises(ValueError, match="is not as fast as its study recorded: (decoding|scoring) takes"):
        verify_speed(measured, str)


def test_a_speed_that_cannot_be_compared_is_said(measured: Path, deployed: Path) -> None:
    said: list[str] = []
    claim(measured, provenance__device="NVIDIA H100")
    assert verify_speed(measured, said.append) == []
    claim(measured, provenance__device=device_name("cpu"))
    described = json.loads((measured / "raysearch.json").read_text())
    described["evaluation"]["study"]["model"]["path"] = "/gone"
    (measured / "raysearch.json").write_text(json.dumps(described))
    assert verify_speed(measured, said.append) == []
    assert re.fullmatch(r"its speed was measured on NVIDIA H100, and this is .* threads: it cannot be compared", said[0])
    assert said[1].startswith("its speed cannot be compared, for the dense model beside which it was measured is not here: ")


def test_the_command_verifies_a_folder_and_a_pick(worker: Worker, candidate: RoundRecord, deployed: Path, run: Run,
                                                  tmp_path: Path) -> None:
    action = candidate.action
    assert action is not None
    worker.ledger.write_trial(TrialRecord(number=0, config=None, actions=(action,), keys=(candidate.key,), status="done",
                                          started_at="now"))
    limit = Constraint(kind="max_nonzero", metric=None, limit=1e9)
    picked = pick(load_study(worker.ledger.directory), [limit])
    path = write_pick(picked, tmp_path / "pick.json")
    for what in (deployed, path):
        code, out, err = run("verify", what)
        assert (code, out.splitlines()[-1]) == (0, f"{what}: verified"), err
        assert "its speed was not measured (raysearch measure), so none is claimed" in out
        assert "text/bits_per_byte" in out
    path = write_pick(picked.model_copy(update={"stored_bytes": 5}), tmp_path / "pick.json")
    assert "is not what the study" in run("verify", path)[2]
    path = write_pick(picked.model_copy(update={"results_sha256": "0"}), tmp_path / "pick.json")
    assert "the study holds more, or something else, than when the pick was made" in run("verify", path, "--limit", 1)[1]
