"""The model card says how a candidate was made and what was measured."""

from pathlib import Path

from raysearch.deploy.export import export
from raysearch.study.records import RoundRecord
from raysearch.trial.worker import Worker


def test_the_card_says_how_it_was_made_and_measured(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> None:
    folder = export(worker.ledger, candidate.key, tmp_path / "out")
    card = (folder / "README.md").read_text()
    metric = worker.ledger.report_metrics(candidate.key)["text/bits_per_byte"]
    assert f"| text/bits_per_byte | {metric.value:.4f}" in card
    assert f"{candidate.num_nonzero:,} of {candidate.num_parameters:,}" in card
    assert f"{candidate.stored_bytes:,}" in card
    assert "report split, which the search never saw" in card
