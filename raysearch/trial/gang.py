"""The Tune trainable: a gang of ranks that stays warm and runs one job after the other, a round per Tune iteration.

The trainable's own actor is rank 0; the other ranks are actors in the same placement group, one bundle each. Processes,
process group, engine and text outlive the job (`reuse_actors`), and the model's files are mapped, one copy in memory per node:
the next job starts by copying shards from there.

A job is the `config` that the searcher suggests: {"kind": "dense"} scores the baseline, {"kind": "trial", "number": n}
runs the trial of that number in the ledger, after every rank has resolved it to "config_hash", the driver's,
{"kind": "control", "number": n} a dense control in the same way, {"kind": "mend", "key": k, "trial": n} computes again what a
candidate of that trial (None: the baseline) has lost, {"kind": "report", "key": k} scores a candidate on the report split.
"""

import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raysearch.config import Study
from raysearch.study.provenance import utc_now
from raysearch.training.hardware import free_port
from raysearch.trial.rank import RECORDED, Job, Rank
from raysearch.trial.watchdog import exit_when_lost


def draining_nodes() -> set[str]:
    """Ids of the nodes that will soon be taken away (a spot notice, `ray drain-node`); Ray has no public call for them."""
    return set(ray._private.state.state.get_draining_nodes())


class Gang(tune.Trainable):
    """Rank 0 and the handle on its peers.

    Before a round, a gang with a node that is being drained ends with the error that Tune does not count as a failure and
    answers with a new gang: the scheduler leaves such nodes out.
    """

    def setup(self, config: Job, *, study: Study, directory: str, root_key: str) -> None:
        group = ray.util.get_current_placement_group()
        self._nodes = set(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
        shared = {"MASTER_ADDR": ray.util.get_node_ip_address(), "MASTER_PORT": str(free_port()),
                  "WORLD_SIZE": str(study.cluster.num_ranks), "LOCAL_RANK": "0"}
        peer = ray.remote(num_cpus=study.cluster.cpus_per_rank, num_gpus=study.cluster.gpus_per_rank)(Rank)
        self.peers = [
            peer.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank))
            .remote(study, directory, root_key, {**shared, "RANK": str(rank)})
            for rank in range(1, study.cluster.num_ranks)
        ]
        self.rank_0 = Rank(study, directory, root_key, {**shared, "RANK": "0"})
        self._begin(config)

    def reset_config(self, new_config: Job) -> bool:
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if leaving := self._nodes & draining_nodes():
            raise RayActorError(error_msg=f"the gang moves: node {', '.join(sorted(leaving))} is being drained", preempted=True)
        others = [peer.step.remote() for peer in self.peers]
        done = threading.Event()
        threading.Thread(target=exit_when_lost, args=(others, done), daemon=True).start()
        try:
            result = self.rank_0.step()
        finally:
            done.set()
        ray.get(others)
        return result

    def cleanup(self) -> None:
        for peer in self.peers:
            ray.kill(peer)

    def _begin(self, job: Job) -> None:
        others = [peer.begin.remote(job) for peer in self.peers]
        hashes = [self.rank_0.begin(job), *ray.get(others)]
        if job["kind"] in RECORDED and (reason := disagreement(job, hashes)):
            ledger = self.rank_0.worker.ledger
            ledger.write_trial(ledger.trial(job["number"]).model_copy(
                update={"status": "failed", "reason": reason, "ended_at": utc_now()}))
            raise ValueError(reason)


def disagreement(job: Job, hashes: Sequence[str | None]) -> str:
    """Which ranks (of the position in `hashes`) resolve the job to something else than the driver; "" when none does."""
    others = [f"rank {rank} ({found})" for rank, found in enumerate(hashes) if found != job["config_hash"]]
    return (f"{', '.join(others)} resolves {job['kind']} {job['number']} to another configuration than the driver "
            f"({job['config_hash']}); every node must run the same raysearch on the same files" if others else "")


def gang_resources(study: Study) -> tune.PlacementGroupFactory:
    """One bundle per rank; the first is the trainable's own actor."""
    gpus = {"GPU": study.cluster.gpus_per_rank} if study.cluster.gpus_per_rank else {}
    bundle = {"CPU": study.cluster.cpus_per_rank, **gpus}
    return tune.PlacementGroupFactory([bundle] * study.cluster.num_ranks, strategy="PACK")
