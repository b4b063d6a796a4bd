"""`raysearch replicate`: the same rounds with other seeds, apart from the study, and how far their numbers spread."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from commands import Run

from analysis.load import load
from analysis.reproduce import study_options
from raysearch.config import Action, Study
from raysearch.replicate import reseeded
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import provenance
from raysearch.study.records import StudyRecord, TrialRecord
from raysearch.study.storage import StorePath
from raysearch.trial.round import dense_round, report_round
from raysearch.trial.run import run_trial
from raysearch.trial.worker import Worker

FIRST = Action(sparsity=0.3)
"""Reads no text."""
SECOND = Action(sparsity=0.5, finetune_tokens=512, learning_rate=1e-3)


@pytest.fixture
def directory(study: Study, apart: Worker) -> Path:
    """A study of one whole trial and a fork on its first round, scored on the report split."""
    apart.ledger.write_study(StudyRecord(study=study, space="s", space_hash="h", root_key=apart.inputs.root_key,
                                         provenance=provenance("CPU")))
    begun = [TrialRecord(number=0, config=None, actions=(FIRST, FIRST.model_copy(update={"sparsity": 0.4})), started_at=""),
             TrialRecord(number=1, config=None, actions=(FIRST, SECOND), forked_at=1, started_at="")]
    for trial in begun:
        apart.ledger.write_trial(trial)
        *_, done = run_trial(apart, trial)
        report_round(apart, apart.ledger.candidate(done.keys[-1]))
    report_round(apart, dense_round(apart))
    return apart.ledger.directory


def test_the_seeds_of_a_fork_are_run_once_and_leave_the_study_as_it_is(directory: Path, run: Run) -> None:
    ledger, before = Ledger.open(directory), load(directory)
    assert run("pick", directory, "--candidate", "1/2")[0] == 0
    code, out, err = run("replicate", directory / "pick.json", "--seeds", 2)
    assert code == 0, err
    assert "seed 1: round 2/2: sparsity 0.5000" in out
    assert f"raysearch results {directory}/replicas" in out
    after = load(directory)
    assert after.drop(columns="damage", errors="ignore").equals(before)
    assert after.attrs["damage"] == ()
    replicas = Ledger.open(directory / "replicas")
    one, other = replicas.trials()
    seeded = [tuple(action.seed for action in trial.actions) for trial in (one, other)]
    assert seeded == [(0, 1), (0, 2)]
    assert one.keys[0] == other.keys[0] == ledger.trial(1).keys[0]  # no text, no seed
    assert len({one.keys[1], other.keys[1], ledger.trial(1).keys[1]}) == 3
    assert replicas.candidate(ledger.study().root_key) == ledger.candidate(ledger.study().root_key)
    assert replicas.report_metrics(ledger.study().root_key) == ledger.report_metrics(ledger.study().root_key)
    assert not list((directory / "replicas").glob("rounds/*/weights*"))
    assert load(directory / "replicas").attrs["damage"] == ()
    values = [replicas.report_metrics(trial.keys[-1])["text/bits_per_byte"].value for trial in (one, other)]
    assert values[0] != values[1]
    (line,) = [line for line in out.splitlines() if line.startswith("text/bits_per_byte")]
    assert line.split()[3:5] == [f"{np.mean(values):.3f}", f"{np.std(values, ddof=1):.2g}"]
    made = {path: path.stat().st_mtime_ns for path in (directory / "replicas").glob("rounds/*/*.json")}
    again = run("replicate", directory / "pick.json", "--seeds", 2)
    assert again[0] == 0, again[2]
    assert made == {path: path.stat().st_mtime_ns for path in (directory / "replicas").glob("rounds/*/*.json")}
    assert line in again[1]


@pytest.mark.parametrize("changes", [{"finetune_tokens": 256}, {"criterion": "wanda", "scope": "layer"},
                                     {"criterion": "taylor"}, {"criterion": "contribution", "pattern": "layer"},
                                     {"budget": "owl", "scope": "layer"}])
def test_a_seed_is_of_every_round_that_reads_text(changes: dict[str, object]) -> None:
    action = FIRST.model_copy(update={**changes, "seed": 7, "data_start_tokens": 1024})
    assert reseeded((FIRST, action), 2) == (FIRST, action.model_copy(update={"seed": 9}))


def test_a_study_on_a_store_has_its_replicas_there(directory: Path, store: StorePath, run: Run) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            (store / str(file.relative_to(directory))).write_bytes(file.read_bytes())
    assert run("pick", store, "--candidate", "1/2", "--out", "pick.json")[0] == 0
    code, out, err = run("replicate", "pick.json", "--seeds", 2)
    assert code == 0, err
    shown = shlex.split(out.splitlines()[-1])[-1]
    code, out, err = run("results", shown)
    assert (code, err, out.count("  done  ")) == (0, "", 4), out
    record = store / "trials" / "00001.json"
    code, _, err = run(*study_options(Ledger.open(store).study().study).split()[1:], "--actions", record, "--out", "again")
    assert (code, Ledger.open("again").trial(0).keys) == (0, Ledger.open(store).trial(1).keys), err


def test_what_cannot_be_replicated_is_one_sentence(directory: Path, run: Run) -> None:
    assert run("pick", directory, "--candidate", "0/2")[0] == 0
    code, _, err = run("replicate", directory / "pick.json")
    assert (code, "its rounds read no text, so every seed gives the same one" in err) == (2, True), err
    assert not (directory / "replicas").exists()
    assert run("replicate", directory / "pick.json", "--seeds", 1)[0] == 2


def test_a_seed_that_diverges_is_left_out_with_its_reason(directory: Path, run: Run) -> None:
    assert run("pick", directory, "--candidate", "1/2")[0] == 0
    ledger = Ledger.open(directory)
    (key,) = ledger.trial(1).keys[1:]
    wild = ledger.candidate(key).model_copy(update={"action": SECOND.model_copy(update={"learning_rate": 1e9})})
    ledger.write_twice(f"rounds/{key}/record.json", wild)
    code, out, err = run("replicate", directory / "pick.json", "--seeds", 2)
    assert "seed 2: left out, for it failed in round 2: " in out
    assert (code, "a spread needs at least 2 seeds whose rounds finished, got 0" in err) == (2, True), err


def test_the_record_of_a_fork_runs_it_again_under_its_keys(directory: Path, run: Run) -> None:
    """By the line that the page shows."""
    ledger = Ledger.open(directory)
    command = study_options(ledger.study().study).split()[1:]
    record = directory / "trials" / "00001.json"
    code, _, err = run(*command, "--actions", record, "--out", "again")
    assert code == 0, err
    assert Ledger.open("again").trial(0).keys == ledger.trial(1).keys
    actions = [action.model_dump() for action in ledger.trial(1).actions]
    Path("list.json").write_text(json.dumps(actions))
    assert run(*command, "--actions", "list.json", "--out", "again")[0] == 0
    assert len(Ledger.open("again").trials()) == 1
    for content, sentence in (("{}", "must be a trial's record"), ("[]", "must be a trial's record"), ("[1]", "must be"),
                              ("nothing", "is no JSON, or damaged"), ('[{"sparsty": 1}]', "action 1"),
                              ('[{"sparsity": 2}]', "sparsity must be at least 0 and below 1"),
                              (record.read_text().replace("0.3", "0.4"), "damaged (its checksum is another one)")):
        Path("list.json").write_text(content)
        code, _, err = run(*command, "--actions", "list.json", "--out", "other")
        assert (code, sentence in err, err.count("\n")) == (2, True, 1), err
        assert not Path("other").exists()
    code, _, err = run(*command, "--actions", record, "--sparsity", 0.5, "--scope", "layer", "--out", "other")
    assert (code, "so the settings target_sparsity, scope contradict it" in err) == (2, True), err
    assert run(*command, "--actions", "none.json", "--out", "other")[0] == 2
