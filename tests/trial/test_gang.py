"""What a gang asks of Ray, and ranks that disagree."""

from raysearch.config import Action, study_of
from raysearch.study.records import config_hash
from raysearch.trial.gang import disagreement


def test_ranks_that_resolve_otherwise_are_named() -> None:
    study, actions = study_of(path="m"), [Action(sparsity=0.5)]
    ours = config_hash(study, actions)
    job = {"kind": "trial", "number": 7, "config_hash": ours}
    assert disagreement(job, [ours, ours]) == ""
    control = {"kind": "control", "number": -2, "config_hash": ours}
    assert disagreement(control, [ours, "other"]).startswith("rank 1 (other) resolves control -2 to another")
    for theirs in (config_hash(study, [Action(sparsity=0.6)]), config_hash(study_of(path="m", weight_decay=0.1), actions)):
        assert theirs != ours
        assert disagreement(job, [ours, theirs]).startswith(f"rank 1 ({theirs}) resolves trial 7 to another configuration")
