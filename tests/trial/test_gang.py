"""A gang's ranks as real Ray actors, without Tune."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from raysearch.config import Study
from raysearch.models.model import load_model
from raysearch.study.ledger import Ledger
from raysearch.training.engine import free_port
from raysearch.trial.base_weights import map_base, put_base
from raysearch.trial.inputs import read_inputs, resolve
from raysearch.trial.rank import Rank
from raysearch.trial.watchdog import ended_when_stuck

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ray_of_two_cpus() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it holds sockets
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
             runtime_env={"env_vars": {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}})  # for workers
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def place_in_file(address: int) -> tuple[str, int]:
    """(device and inode, offset in it) of the file that is mapped at an address of this process; inode 0: none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        region, _, offset, device, inode, *_ = line.split()
        start, end = (int(end, 16) for end in region.split("-"))
        if start <= address < end:
            return f"{device} {inode}", int(offset, 16) + address - start
    raise AssertionError(f"{address:#x} is not mapped")


class Witness(Rank):
    def places(self) -> list[tuple[str, int]]:
        return [place_in_file(values.data_ptr()) for values in self.worker.engine._base]

    def restored(self) -> dict[str, torch.Tensor]:
        """The weights after every one of them was overwritten and the base was loaded again."""
        engine = self.worker.engine
        engine.load({name: torch.full(shape, 7.0) for name, shape in engine.shapes.items()})
        engine.load_base()
        return {name: engine.gather(name) for name in engine.shapes}


def test_the_ranks_of_a_node_share_one_copy_of_the_base(tiny_model: Path, stories: Path, tmp_path: Path,
                                                        ray_of_two_cpus: None) -> None:
    study = resolve(Study(model=str(tiny_model), corpus=str(stories), context_tokens=64, batch_tokens=256, eval_items=2,
                          tasks=("text",), num_ranks=2, zero_stage=0, dtype="bfloat16"))
    base = put_base(study)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    actor = ray.remote(num_cpus=1)(Witness)
    ranks = [actor.remote(study, str(tmp_path), read_inputs(study).root_key, [base], {**shared, "RANK": str(rank)})
             for rank in range(2)]
    first, second = ray.get([rank.places.remote() for rank in ranks])
    assert first == second
    assert [file.split()[1] for file, _ in first].count("0") == 0
    expected = {name: p.float() for name, p in load_model(study.model, torch.bfloat16).named_parameters()}
    for restored in ray.get([rank.restored.remote() for rank in ranks]):
        assert restored.keys() == expected.keys()
        assert all(torch.equal(restored[name], expected[name]) for name in expected)


def test_a_mapped_base_is_read_only(tiny_model: Path, ray_of_two_cpus: None) -> None:
    study = resolve(Study(model=str(tiny_model), context_tokens=64, batch_tokens=256, tasks=(), dtype="bfloat16"))
    arrays = ray.get(put_base(study))
    assert not any(array.flags.writeable for array in arrays.values())
    mapped = map_base(arrays, torch.bfloat16)
    assert all(mapped[name].data_ptr() == array.ctypes.data for name, array in arrays.items())


def test_a_gang_that_begins_leaves_the_stack_file_of_one_that_runs(tiny_model: Path, stories: Path, tmp_path: Path,
                                                                   ray_of_two_cpus: None) -> None:
    """Tune starts gangs for a trial that a warm one then takes: the study of 2026-11-25 lost 7 rounds to such a gang."""
    study = resolve(Study(model=str(tiny_model), corpus=str(stories), context_tokens=64, batch_tokens=256, eval_items=2,
                          tasks=("text",)))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "LOCAL_RANK": "0", "RANK": "0"}
    rank = ray.remote(num_cpus=1)(Rank).remote(study, str(tmp_path), read_inputs(study).root_key, [put_base(study)], shared)
    path = Ledger(tmp_path).stack_path(-1, 0)
    with ended_when_stuck(60, path):
        ray.get(rank.begin.remote({"kind": "dense"}))
        assert path.exists()
        assert ray.get(rank.step.remote())["done"]  # of the same job in both, as when two gangs score candidates
        assert not path.exists()
