"""`--keep`: which weights go when a study has ended, and that they can be had again."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_faults import ACTION

from raysearch.bench import Bench
from raysearch.config import Action, Study, TrialConfig
from raysearch.ledger import Ledger, RoundRecord, StudyRecord, TrialRecord
from raysearch.provenance import provenance, utc_now
from raysearch.round import dense_round, recover_weights, run_round
from raysearch.search import delete_unneeded, frontier_keys
from raysearch.weights import read_weights

WORSE = ACTION.model_copy(update={"learning_rate": 0.1})  # as small as ACTION's candidate, and worse


@pytest.fixture
def ended(bench: Bench, study: Study, tmp_path: Path) -> Iterator[tuple[Bench, list[RoundRecord]]]:
    """A study of two candidates of one size and, from the worse one, an unfinished trial that has another round to go."""
    shared = bench.ledger
    bench.ledger, bench.loaded_key = Ledger(tmp_path / "study"), None
    dense = dense_round(bench)
    bench.ledger.write_study(StudyRecord(study=study, space="s", space_hash="h", root_key=dense.key,
                                         provenance=provenance("cpu")))
    records = [run_round(bench, dense, ACTION), run_round(bench, dense, WORSE)]
    assert records[0].metrics["text/bits_per_byte"].value < records[1].metrics["text/bits_per_byte"].value
    yield bench, records
    bench.ledger, bench.loaded_key = shared, None


def write_trial(ledger: Ledger, status: str, *actions: Action) -> None:
    ledger.write_trial(TrialRecord(number=0, config=TrialConfig(target_sparsity=0.5), actions=actions, status=status,
                                   started_at=utc_now()))


def kept(ledger: Ledger) -> set[str]:
    return {path.parent.name for path in ledger.directory.glob("rounds/*/weights.safetensors")}


def test_the_frontiers_weights_stay(ended: tuple[Bench, list[RoundRecord]], study: Study) -> None:
    bench, (better, worse) = ended
    write_trial(bench.ledger, "done", WORSE)
    said: list[str] = []
    num_bytes = bench.ledger.weights_path(worse.key).stat().st_size
    before = bench.ledger.rounds()
    delete_unneeded(bench.ledger, study, "frontier", said.append)
    assert kept(bench.ledger) == {better.key}
    assert better.key in frontier_keys(bench.ledger, study)
    assert bench.ledger.rounds() == before
    assert said == [f"--keep frontier: deleted 1 files of weights, {num_bytes / 1e3:.3g} kB; records stay, and export computes "
                    "weights again"]


def test_an_unfinished_trial_keeps_what_it_goes_on_from(ended: tuple[Bench, list[RoundRecord]], study: Study) -> None:
    bench, (better, worse) = ended
    write_trial(bench.ledger, "running", WORSE, WORSE.model_copy(update={"sparsity": 0.7}))
    delete_unneeded(bench.ledger, study, "none", lambda line: None)
    assert kept(bench.ledger) == {worse.key}


def test_deleted_weights_are_computed_again(ended: tuple[Bench, list[RoundRecord]], study: Study,
                                            capsys: pytest.CaptureFixture) -> None:
    bench, (better, worse) = ended
    after = run_round(bench, better, ACTION.model_copy(update={"sparsity": 0.7, "data_start_tokens": 1024}))
    path = bench.ledger.weights_path(after.key)
    before = {name: tensor.clone() for name, tensor in read_weights(path, after.weights_sha256).items()}
    delete_unneeded(bench.ledger, study, "none", lambda line: None)
    assert kept(bench.ledger) == set()
    said: list[str] = []
    recover_weights(bench.ledger, after.key, said.append)
    again = read_weights(path, bench.ledger.candidate(after.key).weights_sha256)
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert "up to 2 rounds" in said[0]
    recover_weights(bench.ledger, after.key, said.append)
    assert len(said) == 1


def test_files_that_changed_are_named(ended: tuple[Bench, list[RoundRecord]], study: Study,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    bench, (better, _) = ended
    bench.ledger.delete_weights([better.key])
    bench.ledger.write_study(bench.ledger.study().model_copy(update={"root_key": "another"}))
    say: Callable[[str], None] = print
    with pytest.raises(ValueError, match="the files of the model, the corpus or the tasks are not the study's; put those back"):
        recover_weights(bench.ledger, better.key, say)
