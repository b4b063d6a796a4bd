"""One rank as a real Ray actor, without Tune."""

from pathlib import Path

import ray

from raysearch.config import Action, study_of
from raysearch.study.ledger import Ledger
from raysearch.study.records import TrialRecord, config_hash
from raysearch.training.hardware import free_port
from raysearch.trial.inputs import read_inputs, resolve
from raysearch.trial.rank import Rank
from raysearch.trial.watchdog import ended_when_stuck


def test_a_gang_that_begins_leaves_the_stack_file_of_one_that_runs(tiny_model: Path, stories: Path, tmp_path: Path,
                                                                   ray_of_two_cpus: None) -> None:
    """Tune starts gangs for a trial that a warm one then takes: the study of 2026-11-25 lost 7 rounds to such a gang."""
    study = resolve(study_of(path=str(tiny_model), corpus=str(stories), context_tokens=64, batch_tokens=256, num_items=2,
                          tasks=("text",)))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "LOCAL_RANK": "0", "RANK": "0"}
    rank = ray.remote(num_cpus=1)(Rank).remote(study, str(tmp_path), read_inputs(study).root_key, shared)
    path = Ledger(tmp_path).stack_path(-1, 0)
    with ended_when_stuck(60, path):
        ray.get(rank.begin.remote({"kind": "dense"}))
        assert path.exists()
        assert ray.get(rank.step.remote())["done"]  # of the same job in both, as when two gangs score candidates
        assert not path.exists()
    control = TrialRecord(number=-2, config=None, actions=(Action(sparsity=0.0, finetune_tokens=256, learning_rate=1e-3),),
                          started_at="now")
    Ledger(tmp_path).write_trial(control)  # what a rank resolves one to are its own actions
    assert ray.get(rank.begin.remote({"kind": "control", "number": -2})) == config_hash(study, control.actions)
    results = [ray.get(rank.step.remote()) for _ in range(2)]
    assert [(result["status"], result["done"]) for result in results] == [("running", False), ("done", True)]
    assert Ledger(tmp_path).log_path(-2, 0).is_file()
