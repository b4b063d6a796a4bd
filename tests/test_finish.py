"""`raysearch finish`: one more round on a picked candidate, masks held, which goes on where its processes died."""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from commands import Run
from small_study import sweep

import raysearch.finish as module
from analysis.load import load
from analysis.tables import describe_config
from raysearch.config import Action, Study
from raysearch.finish import finish, finish_loop
from raysearch.models.weights import read_sparse
from raysearch.search.searcher import StudySearcher
from raysearch.search.space import check_given
from raysearch.status import study_status
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import provenance
from raysearch.study.records import StudyRecord, TrialRecord
from raysearch.training.engine import Engine
from raysearch.trial.checkpoints import Checkpoints
from raysearch.trial.rank import Rank
from raysearch.trial.round import dense_round, report_round
from raysearch.trial.run import run_trial
from raysearch.trial.worker import Worker

FIRST = Action(sparsity=0.5, pattern="layer", criterion="top")
"""A layer of two, biases too; trains nothing."""
SECOND = Action(sparsity=0.6, finetune_tokens=512, learning_rate=2e-3, lr_schedule="constant")


@pytest.fixture
def directory(study: Study, apart: Worker) -> Path:
    """A study of two trials, scored on the report split."""
    apart.ledger.write_study(StudyRecord(study=study, space="s", space_hash="h", root_key=apart.inputs.root_key,
                                         provenance=provenance("CPU")))
    for number, actions in enumerate([(FIRST, SECOND), (FIRST,)]):
        trial = TrialRecord(number=number, config=None, actions=actions, started_at="")
        apart.ledger.write_trial(trial)
        *_, done = run_trial(apart, trial)
        report_round(apart, apart.ledger.candidate(done.keys[-1]))
    report_round(apart, dense_round(apart))
    return apart.ledger.directory


@pytest.fixture
def here(apart: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ray Train is this process: a worker that ends is started again, up to three times. The steps that were checkpointed, and
    minus those from which it went on."""
    steps: list[int] = []
    folder = tmp_path / "checkpoint"

    def save(engine: Engine, step: int) -> None:
        folder.mkdir(exist_ok=True)
        engine.save_checkpoint(str(folder), step)
        steps.append(step)

    def restore(engine: Engine) -> int:
        if not folder.is_dir():
            return 0
        steps.append(-(step := engine.load_checkpoint(str(folder))))
        return step

    def fit(loop: Callable[[dict[str, Any]], None], job: dict[str, Any], *_: object) -> None:
        for _ in range(4):
            apart.loaded_key = None
            with contextlib.suppress(KeyboardInterrupt):
                return loop(job)
        raise RuntimeError("training failed: it died too often")

    rank = Rank.__new__(Rank)
    rank.worker = apart
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(module, "Rank", lambda *_: rank)
    monkeypatch.setattr(module, "fit", fit)
    monkeypatch.setattr(module, "start_ray", lambda study: None)
    monkeypatch.setattr(module, "save_checkpoint", save)
    monkeypatch.setattr(module, "load_checkpoint", restore)
    monkeypatch.setattr("raysearch.trial.rank.print_to", lambda path: None)
    monkeypatch.setattr("raysearch.trial.rank.ended_when_stuck", lambda *_: contextlib.nullcontext())
    yield steps
    apart.checkpoints = None


def weights_of(worker: Worker, key: str) -> dict[str, torch.Tensor]:
    return {name: weight.to_dense() if hasattr(weight, "to_dense") and not torch.is_tensor(weight) else weight
            for name, weight in read_sparse(worker.ledger.weights_path(key), None).items()}


def test_a_finished_candidate_is_one_of_the_study(directory: Path, here: list[int], apart: Worker, run: Run) -> None:
    assert run("pick", directory, "--candidate", "0/2")[0] == 0
    code, out, err = run("finish", directory / "pick.json", "--epochs", 4)
    assert code == 0, err
    ledger = Ledger.open(directory)
    trial, picked = ledger.trial(2), ledger.trial(0).keys[-1]
    assert (trial.actions[:2], trial.forked_at, trial.is_finish, trial.status) == ((FIRST, SECOND), 2, True, "done")
    # the learning rate and its path are the candidate's, the text goes on where its own ended, nothing more is pruned
    assert trial.actions[2] == Action(sparsity=0.0, finetune_tokens=4096, learning_rate=2e-3, lr_schedule="constant",
                                      data_start_tokens=512, distill_alpha=0.67)
    record, before = ledger.candidate(trial.keys[-1]), ledger.candidate(picked)
    assert (record.parent, record.num_nonzero, record.sparsity) == (picked, before.num_nonzero, before.sparsity)
    old, new = weights_of(apart, picked), weights_of(apart, record.key)
    assert all(torch.equal(old[name] != 0, new[name] != 0) for name in old)
    assert not all(torch.equal(old[name], new[name]) for name in old)
    bias = new["transformer.h.1.mlp.c_proj.bias"]
    assert not bias.any(), "a layer that went stays away"
    report, worse = ledger.report_metrics(record.key), ledger.report_metrics(picked)
    assert report["text/bits_per_byte"].value < worse["text/bits_per_byte"].value
    assert ledger.items(record.key, "report") is not None
    frame = load(directory)
    row = frame[frame["key"] == record.key].iloc[0]
    assert (row["trial"], row["round"], row["forked_from"]) == (2, 3, "trial 0 round 2")
    assert describe_config(row) == "from trial 0 round 2 on: masks held, global, 4.1k tokens, lr 0.002 constant, KL 0.67"
    assert frame.attrs["damage"] == ()
    compared, pick = (line.split()[1:] for line in out.splitlines()[-2:])
    assert compared == ["compare", str(directory), picked, record.key]
    assert run(*pick)[0] == 0
    assert run("pick", directory, "--candidate", "0/2")[0] == 0
    assert not (directory / "finish").exists() or not list((directory / "finish").iterdir())
    made = sorted((path, path.stat().st_mtime_ns) for path in directory.glob("rounds/*/*"))
    assert run("finish", directory / "pick.json", "--epochs", 4)[0] == 0  # finds it
    assert made == sorted((path, path.stat().st_mtime_ns) for path in directory.glob("rounds/*/*"))
    assert len(ledger.trials()) == 3


def test_a_round_that_was_killed_goes_on_from_its_last_checkpoint(
        directory: Path, here: list[int], apart: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.trial.checkpoints.LOOK_STEPS", 10)
    key, ledger, ends = Ledger.open(directory).trial(0).keys[-1], Ledger.open(directory), [33]
    whole = finish(str(directory), key, 10, print, learning_rate=1e-3).keys[-1]
    wanted, loss = weights_of(apart, whole), ledger.candidate(whole).train_loss
    assert here == []
    for path in (ledger.round_directory(whole), *ledger.twins(f"rounds/{whole}/record.json")[1:]):
        path.rename(path.with_name("aside")) if path.is_dir() else path.unlink()
    ledger.twins(f"rounds/{whole}/report.json")[1].unlink()
    resume = Checkpoints.resume

    def killed(self: Checkpoints, engine: Engine, num_steps: int, after_step: Callable[[int], object]) -> Any:
        def ending(step: int) -> None:
            after_step(step)
            if ends and step == ends[0]:
                ends.pop()
                raise KeyboardInterrupt

        return resume(self, engine, num_steps, ending)

    monkeypatch.setattr(Checkpoints, "resume", killed)
    again = finish(str(directory), key, 10, print, learning_rate=1e-3, checkpoint_every_s=0.0)
    assert again.keys[-1] == whole
    assert here == [10, 20, 30, -30]  # of 40 steps; none in the last tenth
    assert ledger.candidate(whole).train_loss == loss
    found = weights_of(apart, whole)
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_a_sweep_goes_on_beside_it_and_mends_it(study: Study, apart: Worker, here: list[int], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """It is none of the trials that were asked for, whatever the sampler, and a parent of forks like any other candidate."""
    directory, ledger = tmp_path / "study", Ledger(tmp_path / "study")
    sweep(directory, study.replaced(num_trials=3, dense_control=False), apart, monkeypatch)
    trial = finish(str(directory), ledger.trial(0).keys[-1], 2, print)
    assert trial.number == 3
    wanted = ledger.candidate(trial.keys[-1])
    shutil.rmtree(ledger.round_directory(wanted.key))
    lines: list[str] = []
    kinds = sweep(directory, study.replaced(num_trials=4, dense_control=False), apart, monkeypatch, lines.append)
    assert (kinds.count("trial"), kinds.count("mend")) == (1, 1)
    assert [each.number for each in ledger.trials()] == [0, 1, 2, 3, 4]
    assert any("the journal does not know trial 3; it is made again from the records" in line for line in lines)
    mended = ledger.candidate(wanted.key)
    assert (mended.metrics, mended.weights_sha256) == (wanted.metrics, wanted.weights_sha256)
    assert load(directory).attrs["damage"] == ()


def test_a_list_of_given_trials_goes_on_beside_it(directory: Path, study: Study, apart: Worker, here: list[int]) -> None:
    ledger, given = Ledger.open(directory), [(FIRST, SECOND), (FIRST,)]
    finish(str(directory), ledger.trial(0).keys[-1], 1, print)
    check_given(given, ledger.trials())
    searcher = StudySearcher(ledger, study.replaced(num_trials=2, dense_control=False), lambda trial: {}, apart.inputs, print,
                             given)
    assert searcher.sampler.num_asked == 2
    assert study_status(str(directory)).trials == {"running": 0, "done": 2, "stopped": 0, "failed": 0}
    ledger.write_trial(ledger.trial(2).model_copy(update={"status": "running", "keys": ()}))  # its driver was killed
    searcher = StudySearcher(ledger, study.replaced(num_trials=2, dense_control=False), lambda trial: {}, apart.inputs, print,
                             given)
    assert not searcher.has_work()
    again = finish(str(directory), ledger.trial(0).keys[-1], 1, print)
    assert (again.number, again.status) == (2, "done")
    with pytest.raises(ValueError, match="trial 1 of the study is not among the given trials"):
        check_given(given[:1] * 2, ledger.trials())


def dies(job: dict[str, Any]) -> None:
    raise KeyboardInterrupt


def killing_loop(job: dict[str, Any]) -> None:
    """finish_loop, of which rank 1 is killed behind step 120, once; each rank writes from which step it began."""
    resume, folder = Checkpoints.resume, Path(job["directory"])

    def killed(self: Checkpoints, engine: Engine, num_steps: int, after_step: Callable[[int], object]) -> Any:
        def ending(step: int) -> None:
            after_step(step)
            if step == 120 and engine.rank == 1 and not (folder / "killed").exists():
                (folder / "killed").touch()
                time.sleep(10)  # Train's controller, which asks now and then, then knows of the checkpoint of step 100
                os.kill(os.getpid(), signal.SIGKILL)

        done, keeping = resume(self, engine, num_steps, ending)
        with open(folder / f"began-{engine.rank}", "a") as file:
            file.write(f"{done} ")
        return done, keeping

    Checkpoints.resume = killed  # of this process, which ends with the loop
    finish_loop(job)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_rank_of_ray_train_goes_on(directory: Path, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a study whose corpus is named from the current folder."""
    ledger = Ledger.open(directory)
    described, key = ledger.study(), ledger.trial(0).keys[-1]
    study = described.study.replaced(num_ranks=2, zero_stage=2, corpus=stories.name)
    ledger.write_study(described.model_copy(update={"study": study}))
    monkeypatch.chdir(stories.parent)
    monkeypatch.setattr(module, "finish_loop", killing_loop)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        trial = finish(str(directory), key, 40, print, distill_alpha=0.5, checkpoint_every_s=0.0)
    finally:
        ray.shutdown()
    assert (directory / "killed").exists()
    assert [(directory / f"began-{rank}").read_text() for rank in (0, 1)] == ["0 100 ", "0 100 "]
    record = ledger.candidate(trial.keys[-1])
    assert (trial.status, record.provenance.num_ranks, record.provenance.zero_stage) == ("done", 2, 2)
    assert record.num_nonzero == ledger.candidate(key).num_nonzero
    value = ledger.report_metrics(record.key)["text/bits_per_byte"].value
    assert value < ledger.report_metrics(key)["text/bits_per_byte"].value
    assert "step 150/160" in ledger.log_path(trial.number, 0).read_text()
    assert not (directory / "finish" / record.key).exists()


def test_what_cannot_be_finished_is_one_sentence(directory: Path, here: list[int], stories: Path, run: Run,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("pick", directory, "--candidate", "1/1")[0] == 0
    code, _, err = run("finish", directory / "pick.json", "--epochs", 1)
    assert (code, "was never fine-tuned, so it has no learning rate; give --learning-rate" in err) == (2, True), err
    for options, sentence in ((("--epochs", 0.01), "finetune_epochs must be 0 or make at least one step of 256 tokens"),
                              (("--epochs", 1, "--distill-alpha", 2), "distill_alpha"),
                              (("--epochs", 1, "--learning-rate", 0), "learning_rate"),
                              (("--epochs", -1), "epochs must be above 0, got -1"), (("--epochs", 0), "above 0, got 0")):
        code, _, err = run("finish", directory / "pick.json", "--learning-rate", 1e-3, *options)
        assert (code, sentence in err) == (2, True), err
    assert len(Ledger.open(directory).trials()) == 2
    with monkeypatch.context() as patched:
        patched.setattr(module, "finish_loop", dies)
        code, _, err = run("finish", directory / "pick.json", "--learning-rate", 1e-3, "--epochs", 1)
    assert (code, err) == (2, "raysearch: training failed: it died too often\n")
    trial = Ledger.open(directory).trial(2)
    assert (trial.status, trial.crashed, trial.reason) == ("failed", True, "training failed: it died too often")
    code, _, err = run("finish", directory / "pick.json", "--learning-rate", 1e9, "--epochs", 1, "--distill-alpha", 0)
    assert (code, "the round was not finished: round 2: " in err) == (2, True), err
    assert run("results", directory)[0] == 0
    wider = directory.parent / "corpus.txt"
    wider.write_text(stories.read_text() + "\n<|endoftext|>\nOne more.")
    ledger = Ledger.open(directory)
    described = ledger.study()
    ledger.write_study(described.model_copy(update={"study": described.study.replaced(corpus=str(wider))}))
    code, _, err = run("finish", directory / "pick.json", "--epochs", 1, "--learning-rate", 1e-3)
    assert (code, "cannot be trained further because the files of the model, the corpus or the tasks" in err) == (2, True), err
