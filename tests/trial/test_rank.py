"""One rank as a real Ray actor, without Tune."""

from pathlib import Path

import ray

from raysearch.config import study_of
from raysearch.study.ledger import Ledger
from raysearch.training.engine import free_port
from raysearch.trial.base_weights import put_base
from raysearch.trial.inputs import read_inputs, resolve
from raysearch.trial.rank import Rank
from raysearch.trial.watchdog import ended_when_stuck


def test_a_gang_that_begins_leaves_the_stack_file_of_one_that_runs(tiny_model: Path, stories: Path, tmp_path: Path,
                                                                   ray_of_two_cpus: None) -> None:
    """Tune starts gangs for a trial that a warm one then takes: the study of 2026-11-25 lost 7 rounds to such a gang."""
    study = resolve(study_of(path=str(tiny_model), corpus=str(stories), context_tokens=64, batch_tokens=256, num_items=2,
                          tasks=("text",)))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "LOCAL_RANK": "0", "RANK": "0"}
    rank = ray.remote(num_cpus=1)(Rank).remote(study, str(tmp_path), read_inputs(study).root_key, [put_base(study)], shared)
    path = Ledger(tmp_path).stack_path(-1, 0)
    with ended_when_stuck(60, path):
        ray.get(rank.begin.remote({"kind": "dense"}))
        assert path.exists()
        assert ray.get(rank.step.remote())["done"]  # of the same job in both, as when two gangs score candidates
        assert not path.exists()
