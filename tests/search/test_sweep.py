"""Sweeps on a real local Ray, with real Optuna journals."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from sweeps import check_whole, finish, sweep, write_space
from transformers import GPT2LMHeadModel

from raysearch.config import Study, TrialConfig
from raysearch.kernels import device_name
from raysearch.search import sweep as sweep_module
from raysearch.search.space import GIVEN
from raysearch.study.ledger import Ledger


def test_killed_and_started_again_with_more_trials(tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    write_space(tmp_path, tiny_model, stories, dense_control=True)
    process = sweep(tmp_path)
    rounds = tmp_path / "study" / "rounds"
    deadline = time.monotonic() + 120
    while len(list(rounds.glob("[!.]*/weights.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    finish(process)
    before = {p: p.stat().st_mtime_ns for p in rounds.glob("[!.]*/record.json")}
    assert len(before) >= 2
    journal = tmp_path / "study" / "journal.log"
    with open(journal, "ab") as file:
        file.write(b'{"op_code": 4, "wor')  # as a writer dies
    code, out, err = finish(sweep(tmp_path, "--trials", "5"))
    assert code == 0, err
    assert "the journal is damaged in line" in out
    ledger = check_whole(tmp_path, 5)
    (control,) = ledger.controls()
    assert [ledger.candidate(key).sparsity for key in control.keys] == [0.0, 0.0]
    assert "control round 1/2" in out
    assert ledger.report_metrics(control.keys[-1]) is not None
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())


@pytest.mark.slow
def test_a_gang_of_two_ranks(tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    write_space(tmp_path, tiny_model, stories, num_ranks=2, zero_stage=3, max_concurrent=1, num_trials=3)
    code, out, err = finish(sweep(tmp_path))
    assert code == 0, err
    check_whole(tmp_path, 3)


def test_an_edited_study_is_refused(tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    write_space(tmp_path, tiny_model, stories)
    ledger = Ledger(tmp_path / "study")
    from raysearch.search.space import load_space, space_hash
    from raysearch.study.provenance import provenance
    from raysearch.study.records import StudyRecord
    from raysearch.trial.inputs import read_inputs, resolve

    sys.path.insert(0, str(tmp_path))
    try:
        study, space = load_space("space")
    finally:
        sys.path.remove(str(tmp_path))
    study = resolve(study)
    with ledger.lock():
        ledger.attach(StudyRecord(study=study, space="space", space_hash=space_hash(space),
                                  root_key=read_inputs(study).root_key, provenance=provenance(device_name("cpu"))))
    text = (tmp_path / "space.py").read_text()
    (tmp_path / "space.py").write_text(text.replace("0.3, 0.9", "0.3, 0.8"))
    code, _, err = finish(sweep(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert "holds another study, which differs in what space() proposes" in err


def test_a_gang_larger_than_the_cluster_is_refused_with_numbers(tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    write_space(tmp_path, tiny_model, stories, num_ranks=4, cpus_per_rank=100.0)
    code, out, err = finish(sweep(tmp_path))
    assert (code, err.count("\n")) == (2, 1), err
    assert "one trial needs 4 ranks of 100 CPU, each rank on one node, but the cluster's 1 nodes (" in err
    assert "have room for 0" in err
    assert "give --autoscaling" in err


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"objectives": ("num_nonzero", "text/acc")},
     r"objectives must be of sizes \(num_nonzero, .* and metrics \(text/bits_per_byte, .*text/token_perplexity, last_word/acc, "
     r"last_word/perplexity\), got 'text/acc'; change it in STUDY"),
    ({"objectives": ("num_nonzero", "lambada/acc")}, r"and metrics \(text/.*\), got 'lambada/acc'"),
    ({"tasks": ()}, r"and metrics \(there is no task\), got 'text/bits_per_byte'; .* add its task"),
    ({"tasks": ("text", "lambda_x")}, r"task 'lambda_x' is not known; the nearest names are .*lambada"),
    ({"tasks": ("text", "lambada"), "data_dir": "nowhere"}, r"task 'lambada' needs the file nowhere/lambada/test.jsonl"),
])
def test_tasks_and_objective_are_checked_before_anything_is_written(tmp_path: Path, study: Study, settings: dict,
                                                                    sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sweep_module.sweep("space", tmp_path / "study", study.replaced(**settings), lambda trial: {}, print)
    assert not list(tmp_path.iterdir())


def test_given_trials_are_checked_before_anything_is_written(tmp_path: Path, study: Study) -> None:
    given = [TrialConfig(target_sparsity=0.5), TrialConfig(target_sparsity=0.5, l1_lambda=0.1)]
    with pytest.raises(ValueError, match="l1_lambda acts during fine-tuning"):
        sweep_module.sweep("space", tmp_path / "study", study, dict, print, given=given)
    assert not list(tmp_path.iterdir())


def test_given_trials_run_in_their_order_and_are_extended_but_not_exchanged(tmp_path: Path, tiny_model: Path,
                                                                           stories: Path) -> None:
    first = [{"target_sparsity": 0.6}, {"schedule": "linear", "target_sparsity": 0.4, "num_rounds": 2, "finetune_epochs": 0.5}]
    longer = [*first, {"threshold": 0.5, "threshold_unit": "std"}]
    changed = [first[0], {"target_sparsity": 0.7}, longer[2]]
    write_space(tmp_path, tiny_model, stories, num_trials=9)  # the file says how many instead
    ledger = Ledger(tmp_path / "study")

    def run(given: list[dict] | None) -> tuple[int, str, str]:
        (tmp_path / "trials.jsonl").write_text("\n".join(map(json.dumps, given or [])))
        return finish(sweep(tmp_path, *(["--trials-from", "trials.jsonl"] if given else [])))

    def records() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in ledger.directory.glob("rounds/*/record.json")}

    def check_trials(given: list[dict]) -> None:
        assert [(trial.config, trial.status) for trial in ledger.trials()] == [
            (TrialConfig(**fields), "done") for fields in given]
        assert (ledger.study().study.search.num_trials, ledger.study().space_hash) == (len(given), GIVEN)

    code, out, err = run(first)
    assert code == 0, err
    check_trials(first)
    before = records()
    assert len(before) == 1 + 1 + 2  # the dense baseline's, and the trials' rounds

    code, out, err = run(longer)
    assert code == 0, err
    assert "resuming" in out
    check_trials(longer)
    after = records()
    assert (len(after), before.items() <= after.items()) == (len(before) + 1, True)

    for given, sentence in ((changed, "trial 1 of the study is not among the given trials; give the same list"),
                            (None, "holds another study, which differs in")):  # whose trials would be sampled
        code, out, err = run(given)
        assert (code, err.count("\n")) == (2, 1), err
        assert sentence in err
        check_trials(longer)
        assert records() == after


@pytest.mark.slow
def test_a_model_that_is_no_better_than_chance_ends_the_sweep(tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    model = GPT2LMHeadModel.from_pretrained(broken)
    torch.nn.init.normal_(model.transformer.ln_f.bias, std=30.0)
    model.save_pretrained(broken)
    write_space(tmp_path, broken, stories, num_trials=9)
    code, out, err = finish(sweep(tmp_path))
    assert code == 2, out + err
    assert "Traceback" not in err
    sentence = err.splitlines()[-1]
    assert "the dense baseline could not be scored, so no trial can run: raysearch.training.finetune.Diverged" in sentence
    assert sentence.endswith(f"(log in {tmp_path / 'study' / 'trials' / '-0001.rank-0.log'})")
    assert (tmp_path / "study" / "trials" / "-0001.rank-0.log").read_text().count("Diverged: the dense model:") == 1
    assert len(Ledger.open(tmp_path / "study").trials()) <= 3  # those that began beside it


@pytest.mark.slow
def test_a_sweep_in_which_every_trial_failed_exits_with_1(tmp_path: Path, tiny_model: Path, stories: Path) -> None:
    write_space(tmp_path, tiny_model, stories, num_trials=1)
    space = tmp_path / "space.py"
    space.write_text(space.read_text().replace("trial.number == 1", "trial.number < 2")
                     .replace("1e9", "1e9 + trial.number"))  # equal trials are proposed once
    for extend in ("1", "2"):
        code, out, err = finish(sweep(tmp_path, "--trials", extend))
        assert code == 1, out + err
        assert f"candidates of {extend} trials ({extend} failed)" in out
        assert err.splitlines()[-1] == ("raysearch: every trial failed; the reasons: raysearch status "
                                        f"{tmp_path / 'study'}")
