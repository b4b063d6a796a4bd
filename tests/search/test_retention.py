"""`--keep`: which weights go when a study has ended, and that they can be had again."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from raysearch.config import Action, Study, TrialConfig
from raysearch.kernels import device_name
from raysearch.models.weights import read_weights
from raysearch.search.control import due_control
from raysearch.search.retention import delete_above, delete_unneeded, frontier_keys
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import provenance, utc_now
from raysearch.study.records import RoundRecord, StudyRecord, TrialRecord
from raysearch.trial.round import dense_round, recover_weights, run_round
from raysearch.trial.run import run_trial
from raysearch.trial.worker import Worker

ACTION = Action(sparsity=0.5, finetune_tokens=1024, learning_rate=1e-3)
WORSE = ACTION.model_copy(update={"learning_rate": 0.1})  # as small as ACTION's candidate, and worse


@pytest.fixture
def ended(worker: Worker, study: Study, tmp_path: Path) -> Iterator[tuple[Worker, list[RoundRecord]]]:
    """A study of two candidates of one size and, from the worse one, an unfinished trial that has another round to go."""
    shared = worker.ledger
    worker.ledger, worker.loaded_key = Ledger(tmp_path / "study"), None
    dense = dense_round(worker)
    worker.ledger.write_study(StudyRecord(study=study, space="s", space_hash="h", root_key=dense.key,
                                         provenance=provenance(device_name("cpu"))))
    records = [run_round(worker, dense, ACTION), run_round(worker, dense, WORSE)]
    assert records[0].metrics["text/bits_per_byte"].value < records[1].metrics["text/bits_per_byte"].value
    yield worker, records
    worker.ledger, worker.loaded_key = shared, None


def write_trial(ledger: Ledger, status: str, *actions: Action) -> None:
    ledger.write_trial(TrialRecord(number=0, config=TrialConfig(target_sparsity=0.5), actions=actions, status=status,
                                   started_at=utc_now()))


def kept(ledger: Ledger) -> set[str]:
    return {path.parent.name for path in ledger.directory.glob("rounds/*/weights.safetensors")}


def test_the_frontiers_weights_stay(ended: tuple[Worker, list[RoundRecord]], study: Study) -> None:
    worker, (better, worse) = ended
    write_trial(worker.ledger, "done", WORSE)
    said: list[str] = []
    num_bytes = worker.ledger.weights_path(worse.key).stat().st_size
    before = worker.ledger.rounds()
    delete_unneeded(worker.ledger, study, "frontier", said.append)
    assert kept(worker.ledger) == {better.key}
    assert better.key in frontier_keys(worker.ledger, study)
    assert worker.ledger.rounds() == before
    assert said == [f"--keep frontier: deleted 1 files of weights, {num_bytes / 1e3:.3g} kB; records stay, and export computes "
                    "weights again"]


def test_an_unfinished_trial_keeps_what_it_goes_on_from(ended: tuple[Worker, list[RoundRecord]], study: Study) -> None:
    worker, (better, worse) = ended
    write_trial(worker.ledger, "running", WORSE, WORSE.model_copy(update={"sparsity": 0.7}))
    delete_unneeded(worker.ledger, study, "none", lambda line: None)
    assert kept(worker.ledger) == {worse.key}


def test_deleted_weights_are_computed_again(ended: tuple[Worker, list[RoundRecord]], study: Study,
                                            capsys: pytest.CaptureFixture) -> None:
    worker, (better, worse) = ended
    after = run_round(worker, better, ACTION.model_copy(update={"sparsity": 0.7, "data_start_tokens": 1024}))
    path = worker.ledger.weights_path(after.key)
    before = {name: tensor.clone() for name, tensor in read_weights(path, after.weights_sha256).items()}
    delete_unneeded(worker.ledger, study, "none", lambda line: None)
    assert kept(worker.ledger) == set()
    said: list[str] = []
    recover_weights(worker.ledger, after.key, said.append)
    again = read_weights(path, worker.ledger.candidate(after.key).weights_sha256)
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert "up to 2 rounds" in said[0]
    recover_weights(worker.ledger, after.key, said.append)
    assert len(said) == 1


def test_files_that_changed_are_named(ended: tuple[Worker, list[RoundRecord]], study: Study,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    worker, (better, _) = ended
    worker.ledger.delete_weights([better.key])
    worker.ledger.write_study(worker.ledger.study().model_copy(update={"root_key": "another"}))
    say: Callable[[str], None] = print
    with pytest.raises(ValueError, match="the files of the model, the corpus or the tasks are not the study's; put those back"):
        recover_weights(worker.ledger, better.key, say)


def test_a_control_is_on_no_frontier_and_the_last_ones_weights_stay_beside_it(ended: tuple[Worker, list[RoundRecord]],
                                                                              study: Study) -> None:
    worker, (better, _) = ended
    write_trial(worker.ledger, "done", ACTION)
    worker.ledger.write_trial(worker.ledger.trial(0).model_copy(update={"keys": (better.key,)}))
    frontier = frontier_keys(worker.ledger, study)
    due = due_control(worker.ledger, study)
    worker.ledger.write_trial(due)
    *_, control = run_trial(worker, due)
    (key,) = control.keys
    dense, trained = worker.ledger.study().root_key, worker.ledger.candidate(key)
    assert trained.metrics["text/bits_per_byte"].value < min(
        record.metrics["text/bits_per_byte"].value for record in worker.ledger.rounds().values() if record.key != key)
    assert frontier_keys(worker.ledger, study) == frontier  # the best of all, were it a candidate
    delete_unneeded(worker.ledger, study, "frontier", lambda line: None)
    assert kept(worker.ledger) == {better.key, key} | ({key for key in frontier if key != dense})
    delete_unneeded(worker.ledger, study, "none", lambda line: None)
    assert kept(worker.ledger) == set()


def test_an_unfinished_control_keeps_what_it_goes_on_from(ended: tuple[Worker, list[RoundRecord]], study: Study) -> None:
    worker, (better, _) = ended
    actions = (ACTION, ACTION.model_copy(update={"data_start_tokens": 1024}))
    worker.ledger.write_trial(TrialRecord(number=-2, config=None, actions=actions, started_at=utc_now()))
    delete_unneeded(worker.ledger, study, "none", lambda line: None)
    assert kept(worker.ledger) == {better.key}


def test_above_a_limit_the_frontiers_weights_go_last_and_never_those_that_a_trial_goes_on_from(
        ended: tuple[Worker, list[RoundRecord]], study: Study) -> None:
    worker, (good, bad) = ended
    ledger, said = worker.ledger, []

    def left(max_bytes: int) -> list[bool]:
        delete_above(ledger, study, max_bytes, said.append)
        return [ledger.weights_path(record.key).is_file() for record in (good, bad)]

    size = ledger.weights_path(good.key).stat().st_size
    assert left(3 * size) == [True, True]
    assert said == []
    write_trial(ledger, "running", WORSE, ACTION)
    assert left(size) == [False, True]  # the trial goes on from the other one
    assert "1 of them of the frontier; what is wanted of them later is computed again" in said[0]
    worker.loaded_key = None
    run_round(worker, good, ACTION.model_copy(update={"sparsity": 0.6}))  # computes its parent again
    write_trial(ledger, "done", WORSE)
    assert left(int(2.5 * size)) == [True, False]
    assert "of the frontier" not in said[1]
