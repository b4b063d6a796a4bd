"""`raysearch generate`."""

from pathlib import Path

from commands import Run

from raysearch.deploy.export import export
from raysearch.study.records import RoundRecord
from raysearch.trial.worker import Worker


def test_a_deployed_model_writes(worker: Worker, candidate: RoundRecord, run: Run, tmp_path: Path) -> None:
    for format in ("hf", "sparse"):
        deployed = export(worker.ledger, candidate.key, tmp_path / format, format)
        code, out, err = run("generate", deployed, "The red dog of", "--max-new-tokens", 5)
        assert (code, bool(out.strip())) == (0, True), err


def test_what_cannot_be_written_is_one_sentence(tiny_model: Path, run: Run) -> None:
    assert "has no chat template; leave --chat out" in run("generate", tiny_model, "Hello", "--chat")[2]
    assert "a prompt and what follows must be 1 to 64 tokens, got 5 and 60 new ones" in run(
        "generate", tiny_model, "Hello", "--max-new-tokens", 60)[2]
    assert "got 0 and 50 new ones" in run("generate", tiny_model, "")[2]
