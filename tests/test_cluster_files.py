"""cluster.yaml, cluster-onprem.yaml and kuberay.yaml against the checks that Ray itself ships, without a network.

For `ray up` these are the merge of defaults and the JSON schema that the command runs first: keys, types and resources
are checked; instance types, images and shell commands are not. Ray ships no schema for a RayJob. For kuberay.yaml the
code with which Ray's autoscaler reads a RayCluster runs on its rayClusterSpec, and the rest is asserted by hand.
"""

import copy
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from raysearch.search.space import load_space

ROOT = Path(__file__).parent.parent
CLUSTERS = ("cluster.yaml", "cluster-onprem.yaml")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def launcher_config(cluster: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` would use; raises what it would raise."""
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def autoscaler_config(job: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler makes of the RayCluster of a RayJob."""
    return _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "raysearch", "namespace": "default"},
         "spec": copy.deepcopy(job["spec"]["rayClusterSpec"])})


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_up_accepts_the_file_and_starts_it_safely(name: str) -> None:
    config = launcher_config(read(name))
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in str(config)  # not from Ray's defaults either
    assert all("RAY_AUTH_MODE=token ray start" in command for command in (head, worker))
    assert config["file_mounts"]["/home/ray/.ray/auth_token"].endswith("/.ray/auth_token")
    assert any("pip install /home/ray/raysearch" in command for command in config["setup_commands"])


def test_the_aws_cluster_runs_trials_on_spot_gpus_only() -> None:
    config = launcher_config(read("cluster.yaml"))
    types = config["available_node_types"]
    assert config["head_node_type"] == "head_node"
    assert types["head_node"]["resources"] == {"CPU": 0}
    assert types["gpu_worker"]["resources"]["GPU"] > 0
    assert types["gpu_worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (types["gpu_worker"]["min_workers"], types["gpu_worker"]["max_workers"]) == (0, config["max_workers"])


def drop(*path: str) -> Callable[[dict[str, Any]], None]:
    return lambda cluster: inside(cluster, path).pop(path[-1])


def put(value: object, *path: str) -> Callable[[dict[str, Any]], None]:
    return lambda cluster: inside(cluster, path).update({path[-1]: value})


def inside(cluster: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path[:-1]:
        cluster = cluster[key]
    return cluster


@pytest.mark.parametrize(("change", "error", "text"), [
    (put(1, "max_worker"), jsonschema.ValidationError, "max_worker"),
    (put("8", "max_workers"), jsonschema.ValidationError, "'8' is not of type 'integer'"),
    (put("x", "docker", "img"), jsonschema.ValidationError, "img"),
    (put(0.5, "available_node_types", "gpu_worker", "resources", "GPU"), jsonschema.ValidationError, "0.5"),
    (put(-1, "available_node_types", "gpu_worker", "resources", "GPU"), jsonschema.ValidationError, "-1"),
    (put("head", "head_node_type"), ValueError, "head_node_type"),
    (put(9, "available_node_types", "gpu_worker", "min_workers"), ValueError, "max_workers"),
    (put("awz", "provider", "type"), NotImplementedError, "awz"),
    (drop("docker", "container_name"), AssertionError, None),
])
def test_a_mistake_in_the_aws_file_is_caught(change: Callable[[dict[str, Any]], None], error: type[Exception],
                                             text: str | None) -> None:
    cluster = read("cluster.yaml")
    change(cluster)
    with pytest.raises(error, match=text):
        launcher_config(cluster)


def test_the_rayjob_runs_the_sweep_on_an_authenticated_autoscaling_cluster() -> None:
    job = read("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    command = job["spec"]["entrypoint"].split()
    assert command[:4] == ["python", "-m", "raysearch", "sweep"]
    load_space(command[4])
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}  # guards the dashboard, which is on 0.0.0.0 inside Kubernetes
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    types = autoscaler_config(job)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu-worker"]["resources"]["GPU"] == 2
    assert types["gpu-worker"]["max_workers"] == 8


def test_every_pod_sees_the_study_directory() -> None:
    spec = read("kuberay.yaml")["spec"]
    out = spec["entrypoint"].split()[-1]
    cluster = spec["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        (shared,) = [volume for volume in pod["volumes"] if volume["name"] == mounts["/shared"]]
        assert shared["persistentVolumeClaim"]["claimName"] == "raysearch-shared"
        assert out.startswith("/shared/")


@pytest.mark.parametrize("change", [
    drop("spec", "rayClusterSpec", "headGroupSpec"),
    drop("spec", "rayClusterSpec", "workerGroupSpecs"),
    lambda job: drop("groupName")(job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]),
    lambda job: drop("maxReplicas")(job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]),
])
def test_a_mistake_in_the_rayjob_that_the_autoscaler_would_meet_is_caught(
        change: Callable[[dict[str, Any]], None]) -> None:
    job = read("kuberay.yaml")
    change(job)
    with pytest.raises(KeyError):
        autoscaler_config(job)


def test_the_pinned_ray_fits_pyproject() -> None:
    (ray,) = [r for r in map(Requirement, metadata.requires("raysearch-llm") or ()) if r.name == "ray"]
    kuberay = read("kuberay.yaml")["spec"]["rayClusterSpec"]
    images = [read("cluster.yaml")["docker"]["image"].partition(":")[2].partition("-")[0], kuberay["rayVersion"]]
    images += [group["template"]["spec"]["containers"][0]["image"].rpartition("-ray")[2]
               for group in (kuberay["headGroupSpec"], *kuberay["workerGroupSpecs"])]
    assert len(set(images)) == 1
    assert ray.specifier.contains(images[0])
