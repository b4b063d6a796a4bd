"""What a sweep would cost and write, before anything runs: sampled trials priced with one short measured round.

Measured here, on one rank: the time of an optimizer step on a rank's share of the batch, of a prune, of a few evaluated
items of each task, and the bytes of one stored candidate. Everything else is those numbers times counts.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import raysearch
from raysearch.cluster.joining import placed
from raysearch.cluster.placement import host_bytes, work_of
from raysearch.config import Action, Study
from raysearch.evaluation import evaluate
from raysearch.models.model import model_size
from raysearch.search.forks import check_rule
from raysearch.search.sampler import NUM_WHOLE
from raysearch.search.space import load_space, sample_trials
from raysearch.study.ledger import Ledger
from raysearch.study.records import RoundRecord, round_key
from raysearch.study.storage import AnyPath, location
from raysearch.training.finetune import Diverged
from raysearch.trial.actions import control_actions, longest
from raysearch.trial.inputs import Inputs, check_objectives, read_inputs, resolve
from raysearch.trial.parts import check_parts
from raysearch.trial.round import dense_round, run_round
from raysearch.trial.worker import Worker
from raysearch.units import human_bytes

NUM_DRAWS = 200
NUM_STEPS = 4
NUM_ITEMS = 32
"""Timed optimizer steps, and evaluated items of each task, after one step and FEW_ITEMS to warm up."""
FEW_ITEMS = 2
SLOW_S = 5.0
"""Where warming up took longer than this, fewer are timed."""

Trials = Sequence[tuple[Action, ...]]


@dataclass(frozen=True)
class Calibration:
    """One short round on one rank in this process."""

    device: str
    on_gpu: bool
    start_s: float
    """A gang's imports in a process of its own, its inputs and its engine: once per gang."""
    step_s: float
    """One optimizer step of batch_tokens / num_ranks tokens; 0 where nothing is fine-tuned."""
    prune_s: float
    evaluate_s: float
    """All of the selection split's items on this rank, from the time of a few of each task."""
    num_steps: int
    num_items: int
    """Timed for `step_s` and `evaluate_s`."""
    candidate_bytes: int
    """On disk, at `sparsity`."""
    sparsity: float


@dataclass(frozen=True)
class Plan:
    study: Study
    space: str
    directory: AnyPath
    trials: Trials
    """Resolved draws, a whole number of studies; of a fork its round alone."""
    root_key: str
    calibration: Calibration


def make_plan(space_name: str, directory: str | AnyPath, echo: Callable[[str], None]) -> Plan:
    """Samples the space and measures; ValueError of one sentence for whatever `sweep` would refuse."""
    study, space = load_space(space_name)
    study = resolve(study)
    started = time.perf_counter()
    inputs = read_inputs(study, echo)
    inputs_s = time.perf_counter() - started
    check_objectives(study, inputs)
    num_studies = max(1, NUM_DRAWS // study.search.num_trials)
    trials = sample_trials(study, space, inputs, num_studies * study.search.num_trials)
    rule = check_rule(study, space, inputs.num_train_tokens)
    check_parts([*rule, *(action for actions in trials for action in actions)], study)
    if study.search.sampler == "ours":
        trials = with_forks(trials, study.search.num_trials)
    study = placed(study, None, work_of(study, trials), echo)
    if study.cluster.gpus_per_rank:
        host = host_bytes(model_size(study.model.path), study.cluster.zero_stage, study.model.dtype)
        echo(f"host        {human_bytes(host)} of memory for each rank, while it loads or stores the model")
    return Plan(study, space_name, location(directory), trials, inputs.root_key, calibrate(study, inputs, trials, inputs_s))


def with_forks(trials: Trials, num_trials: int) -> Trials:
    """As a search with forks runs studies of so many trials: after the first ones, a round each on what is not known yet."""
    return [actions if number % num_trials < NUM_WHOLE else actions[:1] for number, actions in enumerate(trials)]


def calibrate(study: Study, inputs: Inputs, trials: Trials, inputs_s: float = 0.0) -> Calibration:
    """Prunes to the draws' mean sparsity (stored bytes are linear in it), trains a few steps at learning rate 0,
    evaluates, stores the candidate in a folder that is deleted."""
    actions = [action for trial in trials for action in trial]
    # a threshold names no sparsity before it is applied
    sparsity = statistics.fmean([action.sparsity for action in actions if action.sparsity is not None] or [0.5])
    one_rank = study.replaced(num_ranks=1, batch_tokens=study.training.batch_tokens // study.cluster.num_ranks,
                              objectives=("num_nonzero", study.search.objective), constraints={})  # no time is predicted here
    trains = any(action.finetune_tokens for action in actions)
    if not study.cluster.gpus_per_rank:  # as the ranks of such a study are started
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(max(1, int(study.cluster.cpus_per_rank)))
    with tempfile.TemporaryDirectory(prefix="raysearch-plan-") as folder:
        started = time.perf_counter()
        home = Path(raysearch.__path__[0]).parent  # in the current folder a file of the user would stand for a module of ours
        subprocess.run([sys.executable, "-c", "import raysearch.trial.gang"], check=True, capture_output=True, cwd=home)
        worker = Worker(one_rank, Ledger(folder), replace(inputs, tasks={"selection": (), "report": ()}))
        start_s = inputs_s + time.perf_counter() - started
        dense = dense_round(worker)
        warm = timed_round(worker, dense, sparsity / 2, 1 if trains else 0)
        num_steps = (NUM_STEPS if warm.finetune_s < SLOW_S else 1) * trains
        timed = timed_round(worker, warm, sparsity, num_steps)
        evaluate_s, num_items = time_evaluation(worker, inputs)
        candidate_bytes = sum(f.stat().st_size for f in worker.ledger.round_directory(timed.key).iterdir())
        return Calibration(timed.provenance.device, worker.engine.device.type == "cuda", start_s,
                           timed.finetune_s / num_steps if num_steps else 0.0, timed.prune_s, evaluate_s, num_steps, num_items,
                           candidate_bytes, sparsity)


def timed_round(worker: Worker, parent: RoundRecord, sparsity: float, num_steps: int) -> RoundRecord:
    """A round of `num_steps` optimizer steps at learning rate 0; the times are in its record."""
    tokens = num_steps * worker.study.training.batch_tokens
    try:
        return run_round(worker, parent, Action(sparsity=sparsity, finetune_tokens=tokens))
    except Diverged as error:
        raise ValueError(f"model {worker.study.model.path}: {error}, so it is broken; give a model that works") from error


def time_evaluation(worker: Worker, inputs: Inputs) -> tuple[float, int]:
    """(seconds of the whole selection split, timed items): each task's items cost what a few of them did."""
    total_s, num_items = 0.0, 0
    worker.engine.model.eval()
    for task in inputs.tasks["selection"]:
        for limit in (FEW_ITEMS, NUM_ITEMS):
            num_timed = min(limit, len(task.eval_docs))
            started = time.perf_counter()
            evaluate(worker.scorer, [task], limit=num_timed)
            if worker.engine.device.type == "cuda":
                torch.cuda.synchronize()
            task_s = time.perf_counter() - started
            if task_s > SLOW_S:
                break
        total_s += task_s / num_timed * len(task.eval_docs)
        num_items += num_timed
    return total_s, num_items


def rank_seconds(action: Action, study: Study, calibration: Calibration) -> float:
    """Busy time of one round, summed over its ranks; the evaluation's items are shared out among them."""
    steps = action.finetune_tokens / study.training.batch_tokens
    per_rank = calibration.prune_s + steps * calibration.step_s
    return per_rank * study.cluster.num_ranks + calibration.evaluate_s


def distinct_rounds(root_key: str, trials: Trials) -> dict[str, Action]:
    """Round key -> action: rounds that trials share by a common prefix run once."""
    rounds = {}
    for actions in trials:
        key = root_key
        for action in actions:
            key = round_key(key, action)
            rounds[key] = action
    return rounds


def describe_plan(plan: Plan) -> str:
    """Plain lines, without a final newline."""
    study, cluster, calibration = plan.study, plan.study.cluster, plan.calibration
    starts = range(0, len(plan.trials), study.search.num_trials)
    studies = [plan.trials[start:start + study.search.num_trials] for start in starts]
    rounds = [distinct_rounds(plan.root_key, trials) for trials in studies]
    with_control = [distinct_rounds(plan.root_key, [*trials, control_actions(longest(trials))]) if study.search.dense_control
                    else distinct for trials, distinct in zip(studies, rounds)]
    dense_s = calibration.evaluate_s
    busy_h = [(dense_s + sum(rank_seconds(action, study, calibration) for action in distinct.values())) / 3600
              for distinct in with_control]
    lengths = [len(actions) for actions in plan.trials]
    num_rounds = statistics.fmean(sum(map(len, trials)) for trials in studies)
    num_distinct = statistics.fmean(map(len, rounds))
    at_once = min(study.search.max_concurrent, study.search.num_trials)
    unit, per_rank = ("GPU", cluster.gpus_per_rank) if cluster.gpus_per_rank else ("CPU", cluster.cpus_per_rank)
    num_control = statistics.fmean(map(len, with_control)) - num_distinct
    disk_bytes = (num_distinct + num_control) * calibration.candidate_bytes
    free = "of objects"
    if isinstance(plan.directory, Path):
        existing = next(folder for folder in (plan.directory, *plan.directory.parents) if folder.exists())
        free = f"of disk, {human_bytes(shutil.disk_usage(existing).free)} are free"
    measured = f"measured on one rank here: {calibration.device}"
    if cluster.gpus_per_rank and not calibration.on_gpu:
        measured += ", NOT on a GPU as the study asks: the hours below are for this processor"
    thresholds = any(action.threshold is not None for actions in plan.trials for action in actions)
    return "\n".join([
        f"study       {plan.space}: {study.search.num_trials} trials of {study.model.path}",
        f"gang        {cluster.num_ranks} rank{'s' * (cluster.num_ranks > 1)} of {cluster.gpus_per_rank:g} GPU and "
        f"{cluster.cpus_per_rank:g} CPU, ZeRO-{cluster.zero_stage}, {study.model.dtype}",
        f"at once     at most {at_once} trials: {at_once * cluster.num_ranks * cluster.gpus_per_rank:g} GPU and "
        f"{at_once * cluster.num_ranks * cluster.cpus_per_rank:g} CPU; fewer where the cluster has fewer",
        f"rounds      {statistics.fmean(lengths):.1f} per trial ({min(lengths)} to {max(lengths)}, {len(lengths)} "
        "random draws)",
        f"            {num_rounds:.0f} in all, of which {num_rounds - num_distinct:.1f} are shared prefixes, run once; "
        f"{num_control:.1f} of the dense control beside them",
        measured,
        f"            step of {study.training.batch_tokens // cluster.num_ranks} tokens {calibration.step_s:.3f} s, prune "
        f"{calibration.prune_s:.3f} s, evaluation {calibration.evaluate_s:.2f} s "
        f"(from {calibration.num_steps} steps and {calibration.num_items} items)",
        f"            start of a gang {calibration.start_s:.0f} s (imports, inputs, engine; without that of Ray), candidate of "
        f"sparsity {calibration.sparsity:.2f} {human_bytes(calibration.candidate_bytes)}",
        "extrapolated from it to random draws of this space:",
        f"            {statistics.fmean(busy_h) * per_rank:.3g} {unit}-hours ({min(busy_h) * per_rank:.3g} to "
        f"{max(busy_h) * per_rank:.3g}), {statistics.fmean(busy_h) / (at_once * cluster.num_ranks):.3g} hours "
        f"with {at_once} trials at once",
        f"            {human_bytes(disk_bytes)} {free}"
        + (" (threshold rounds counted at the mean sparsity of the others)" if thresholds else ""),
        "not in it   starts of gangs, traffic between ranks, sharing of a GPU, the report split of the frontier,",
        "            and that the sampler moves away from random draws",
        f"writes to   {plan.directory}:",
        "            study.json, journal.log, rounds/KEY/ (records and weights), trials/, tune/ (logs)",
        "            and packed text to RAYSEARCH_CACHE (this command has already written it)"])
