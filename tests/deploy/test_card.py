"""The model card says how a candidate was made and what was measured."""

from pathlib import Path

from raysearch.config import Action
from raysearch.deploy.export import export
from raysearch.study.records import RoundRecord, TrialRecord
from raysearch.trial.run import run_trial
from raysearch.trial.worker import Worker


def test_the_card_says_how_it_was_made_and_measured(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> None:
    folder = export(worker.ledger, candidate.key, tmp_path / "out")
    card = (folder / "README.md").read_text()
    metric = worker.ledger.report_metrics(candidate.key)["text/bits_per_byte"]
    assert f"| text/bits_per_byte | {metric.value:.4f}" in card
    assert f"{candidate.num_nonzero:,} of {candidate.num_parameters:,}" in card
    assert f"{candidate.stored_bytes:,}" in card
    assert "report split, which the search never saw" in card


def test_a_controls_card_holds_its_actions(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> None:
    """Like that of any trial that has no configuration."""
    action = Action(sparsity=0.0, finetune_tokens=256, learning_rate=1e-3)
    *_, control = run_trial(worker, TrialRecord(number=-2, config=None, actions=(action,), started_at="now"))
    card = (export(worker.ledger, control.keys[-1], tmp_path / "out") / "README.md").read_text()
    assert "round 1 of control, of a raysearch study" in card
    assert 'Trial settings: `[{"finetune_tokens": 256, "learning_rate": 0.001, "sparsity": 0.0}]`' in card
