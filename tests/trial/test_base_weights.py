"""One copy of the dense weights on a node, which every rank maps."""

from pathlib import Path

import ray
import torch

from raysearch.config import study_of
from raysearch.models.model import load_model
from raysearch.training.engine import free_port
from raysearch.trial.base_weights import map_base, put_base
from raysearch.trial.inputs import read_inputs, resolve
from raysearch.trial.rank import Rank


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
    study = resolve(study_of(path=str(tiny_model), corpus=str(stories), context_tokens=64, batch_tokens=256, num_items=2,
                          tasks=("text",), num_ranks=2, zero_stage=0, dtype="bfloat16"))
    base = put_base(study)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    actor = ray.remote(num_cpus=1)(Witness)
    ranks = [actor.remote(study, str(tmp_path), read_inputs(study).root_key, [base], {**shared, "RANK": str(rank)})
             for rank in range(2)]
    first, second = ray.get([rank.places.remote() for rank in ranks])
    assert first == second
    assert [file.split()[1] for file, _ in first].count("0") == 0
    expected = {name: p.float() for name, p in load_model(study.model.path, torch.bfloat16).named_parameters()}
    for restored in ray.get([rank.restored.remote() for rank in ranks]):
        assert restored.keys() == expected.keys()
        assert all(torch.equal(restored[name], expected[name]) for name in expected)


def test_a_mapped_base_is_read_only(tiny_model: Path, ray_of_two_cpus: None) -> None:
    study = resolve(study_of(path=str(tiny_model), context_tokens=64, batch_tokens=256, tasks=(), dtype="bfloat16"))
    arrays = ray.get(put_base(study))
    assert not any(array.flags.writeable for array in arrays.values())
    mapped = map_base(arrays, torch.bfloat16)
    assert all(mapped[name].data_ptr() == array.ctypes.data for name, array in arrays.items())
