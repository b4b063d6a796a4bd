"""The Tune trainable: a gang of ranks that stays warm and runs one job after the other, a round per Tune iteration.

The trainable's own actor is rank 0; the other ranks are actors in the same placement group, one bundle each. Processes,
process group, engine and text outlive the job (`reuse_actors`), and the base weights lie in the object store, one copy per
node: the next job starts by copying shards from there.

A job is the `config` that the searcher suggests: {"kind": "dense"} scores the baseline, {"kind": "trial", "number": n}
runs the trial of that number in the ledger, after every rank has
resolved it to "config_hash", the driver's, {"kind": "report", "key": k} scores a candidate on the report split.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from raysearch.bench import Bench, read_inputs
from raysearch.config import Study
from raysearch.engine import free_port
from raysearch.ledger import Ledger, RoundRecord, config_hash
from raysearch.model import load_model
from raysearch.provenance import utc_now
from raysearch.round import dense_round, report_round, resolve_actions, run_trial
from raysearch.storage import StorePath, pull, push, working_copy

Job = dict[str, Any]

RANK_0_EXTRA_S = 2.0
"""Its clock for a round runs longer, so that its peers have written their stacks when its death ends them."""
RANK_0_UPLOAD_EXTRA_S = 10.0
"""The same where they upload them to a store."""
UPLOAD_LIMIT_S = 30.0
"""For a stuck process to upload its stacks to a store."""
GRACE_S = 5.0
"""For rank 0 to find by itself that a peer died; over NCCL it would wait until the round's limit."""


def put_base(study: Study) -> ray.ObjectRef:
    """The dense model's tensors in the object store, which keeps one copy per node for as long as the caller holds this:
    arrays by parameter name in the study's dtype, bfloat16 by its bits as int16, since numpy has no such number."""
    dtype = getattr(torch, study.dtype)
    bits = torch.int16 if dtype == torch.bfloat16 else dtype
    return ray.put({name: parameter.detach().view(bits).numpy()
                    for name, parameter in load_model(study.model, dtype).named_parameters()})


def map_base(arrays: Mapping[str, np.ndarray], dtype: torch.dtype) -> dict[str, Tensor]:
    """`put_base`'s arrays as tensors of `dtype` on the object store's own memory: a write there ends the process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {name: torch.from_numpy(array).view(dtype) for name, array in arrays.items()}


class Rank:
    """One process of a gang; `base` holds the one reference that `put_base` gave."""

    def __init__(self, study: Study, directory: str, root_key: str, base: Sequence[ray.ObjectRef],
                 environment: dict[str, str]) -> None:
        os.environ.update(environment)
        if not study.gpus_per_rank:
            os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(max(1, int(study.cpus_per_rank)))
        inputs = read_inputs(study)
        if inputs.root_key != root_key:
            raise ValueError(f"rank {environment['RANK']} reads another model, corpus or task than the driver (root key "
                             f"{inputs.root_key}, not {root_key}); every node must see the same files at {study.model}")
        self.bench = Bench(study, Ledger(directory), inputs, map_base(ray.get(base[0]), getattr(torch, study.dtype)))
        self._results: Iterator[dict[str, Any]] = iter(())

    def begin(self, job: Job) -> str | None:
        """Makes `job` the one that `step` works on; for a trial, the hash of what this rank resolves it to.

        Touches nothing of the job: Tune may have started a gang for it that is not needed, as a warm one became free.
        """
        ledger, number, rank = self.bench.ledger, job.get("number", -1), self.bench.engine.rank
        self._log_path, self._stack_path = ledger.log_path(number, rank), ledger.stack_path(number, rank)
        print_to(pull(self._log_path))
        self._results = self._run(job)
        if job["kind"] != "trial":
            return None
        study, config = self.bench.study, ledger.trial(number).config
        return config_hash(study, resolve_actions(config, study, self.bench.inputs.num_train_tokens))

    def step(self) -> dict[str, Any]:
        """The job's next result; "done" is True in its last."""
        path, limit_s = self._stack_path, self.bench.study.round_limit_s
        if self.bench.engine.rank == 0:
            limit_s += RANK_0_UPLOAD_EXTRA_S if isinstance(path, StorePath) else RANK_0_EXTRA_S
        try:
            with (uploaded_when_stuck(limit_s, path, self._push_log) if isinstance(path, StorePath)
                  else ended_when_stuck(limit_s, path)):
                return next(self._results)
        except Exception:
            traceback.print_exc()  # into the log
            raise
        finally:
            self._push_log()

    def _push_log(self) -> None:
        """To a store; one that refuses it costs no trial. What a process prints after this is lost when it is killed."""
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            push(self._log_path)

    def _run(self, job: Job) -> Iterator[dict[str, Any]]:
        ledger = self.bench.ledger
        if job["kind"] == "trial":
            log_path = str(ledger.log_path(job["number"], 0))
            for record in run_trial(self.bench, ledger.trial(job["number"]).model_copy(update={"log_path": log_path})):
                key = record.keys[-1] if record.keys else None
                numbers = measured(ledger.candidate(key)) if key and record.status == "running" else {}
                yield {"done": record.status != "running", "status": record.status, "key": key, **numbers}
        else:
            dense = dense_round(self.bench)
            candidate = dense if job["kind"] == "dense" else ledger.candidate(job["key"])
            report = report_round(self.bench, candidate)
            yield {"done": True, "status": "done", "key": candidate.key, **measured(candidate),
                   **{f"report/{name}": metric.value for name, metric in report.items()}}


def measured(record: RoundRecord) -> dict[str, float]:
    """A candidate's numbers under the names that TensorBoard and the other loggers show."""
    numbers = record.model_dump(include={"depth", "sparsity", "model_sparsity", "num_nonzero", "stored_bytes",
                                         "resident_bytes", "train_loss", "prune_s", "finetune_s", "evaluate_s"},
                                exclude_none=True)
    return numbers | {name: metric.value for name, metric in record.metrics.items()}


def print_to(path: Path) -> None:
    """From now on this process prints to the end of `path`, its C libraries too: a file that every node sees."""
    path.parent.mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


@contextlib.contextmanager
def ended_when_stuck(limit_s: float, stack_path: Path) -> Iterator[None]:
    """Where the block takes longer, writes the stacks of this process to `stack_path` and ends it, whatever it waits for:
    the clock is a C thread that needs no interpreter lock."""
    stack_path.parent.mkdir(exist_ok=True)
    with open(stack_path, "w") as file:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    stack_path.unlink(missing_ok=True)  # two gangs that score candidates share a path


@contextlib.contextmanager
def uploaded_when_stuck(limit_s: float, stack_path: StorePath, push_log: Callable[[], None]) -> Iterator[None]:
    """`ended_when_stuck` with an upload, which needs the interpreter lock: where that is held too, no stack is uploaded."""
    stack_path.unlink(missing_ok=True)  # of an attempt before this one

    def upload_and_end() -> None:
        with open(working_copy(stack_path), "w") as file:
            faulthandler.dump_traceback(file)
        push(stack_path)
        push_log()
        os._exit(1)

    clock = threading.Timer(limit_s, upload_and_end)
    clock.daemon = True
    clock.start()
    with ended_when_stuck(limit_s + UPLOAD_LIMIT_S, working_copy(stack_path)):
        try:
            yield
        finally:
            clock.cancel()


def exit_when_lost(others: list[ray.ObjectRef], done: threading.Event) -> None:
    """Ends this process when the actor of one of `others` dies, unless `done` is set soon after."""
    try:
        ray.get(others)
    except (RayActorError, OutOfMemoryError) as error:
        if not done.wait(GRACE_S):
            print(f"a rank of this gang died: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    except ray.exceptions.RayTaskError:
        pass  # an error of the peer's own, which `step` raises


def draining_nodes() -> set[str]:
    """Ids of the nodes that will soon be taken away (a spot notice, `ray drain-node`); Ray has no public call for them."""
    return set(ray._private.state.state.get_draining_nodes())


class PruneTrial(tune.Trainable):
    """Rank 0 and the handle on its peers.

    Before a round, a gang with a node that is being drained ends with the error that Tune does not count as a failure and
    answers with a new gang: the scheduler leaves such nodes out.
    """

    def setup(self, config: Job, *, study: Study, directory: str, root_key: str, base: Sequence[ray.ObjectRef]) -> None:
        group = ray.util.get_current_placement_group()
        self._nodes = set(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
        shared = {"MASTER_ADDR": ray.util.get_node_ip_address(), "MASTER_PORT": str(free_port()),
                  "WORLD_SIZE": str(study.num_ranks), "LOCAL_RANK": "0"}
        peer = ray.remote(num_cpus=study.cpus_per_rank, num_gpus=study.gpus_per_rank)(Rank)
        self.peers = [
            peer.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank))
            .remote(study, directory, root_key, base, {**shared, "RANK": str(rank)}) for rank in range(1, study.num_ranks)
        ]
        self.rank_0 = Rank(study, directory, root_key, base, {**shared, "RANK": "0"})
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
        if job["kind"] == "trial" and (reason := disagreement(job, hashes)):
            ledger = self.rank_0.bench.ledger
            ledger.write_trial(ledger.trial(job["number"]).model_copy(
                update={"status": "failed", "reason": reason, "ended_at": utc_now()}))
            raise ValueError(reason)


def disagreement(job: Job, hashes: Sequence[str | None]) -> str:
    """Which ranks (of the position in `hashes`) resolve the job to something else than the driver; "" when none does."""
    others = [f"rank {rank} ({found})" for rank, found in enumerate(hashes) if found != job["config_hash"]]
    return (f"{', '.join(others)} resolves trial {job['number']} to another configuration than the driver "
            f"({job['config_hash']}); every node must run the same raysearch on the same files" if others else "")


def gang_resources(study: Study) -> tune.PlacementGroupFactory:
    """One bundle per rank; the first is the trainable's own actor."""
    bundle = {"CPU": study.cpus_per_rank, "GPU": study.gpus_per_rank} if study.gpus_per_rank else {"CPU": study.cpus_per_rank}
    return tune.PlacementGroupFactory([bundle] * study.num_ranks, strategy="PACK")
