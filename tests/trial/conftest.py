"""A local Ray for tests of actors without Tune."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ray_of_two_cpus() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it holds sockets
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
             runtime_env={"env_vars": {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}})  # for workers
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
