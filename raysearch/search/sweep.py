"""The sweep: Optuna proposes, Ray Tune runs, the ledger remembers.

Optuna's journal and the round store are the whole state of a study. The same `sweep` again attaches to them: finished
rounds are found, trials that were running start again from their last finished round, a larger number of trials extends.
Nothing of Ray is restored.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ray import tune
from ray.tune import TuneError

from raysearch.cluster.ending import ending_actors
from raysearch.cluster.joining import placed, shortage, start_ray
from raysearch.cluster.placement import work_of
from raysearch.config import Study, TrialConfig
from raysearch.kernels.device import device_name
from raysearch.search.forks import check_rule
from raysearch.search.loggers import Loggers, trackers
from raysearch.search.mending import mend
from raysearch.search.progress import last_line
from raysearch.search.retention import Keep, delete_unneeded
from raysearch.search.searcher import StudySearcher
from raysearch.search.space import GIVEN, GivenTrial, Proposals, Space, check_given, sample_trials
from raysearch.search.warm_start import check_warm_start, warm_start
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import provenance
from raysearch.study.records import StudyRecord
from raysearch.study.storage import AnyPath, StorePath, check_bucket
from raysearch.trial.actions import check_actions, resolve_actions
from raysearch.trial.gang import Gang, gang_resources
from raysearch.trial.inputs import check_objectives, read_inputs, resolve
from raysearch.trial.parts import check_parts
from raysearch.trial.rank import Job


@dataclass(frozen=True)
class SweepResult:
    directory: AnyPath
    interrupted: bool
    num_trials: int
    num_candidates: int
    num_failed: int
    seconds: float


def sweep(space_name: str, directory: str | AnyPath, study: Study, space: Space, echo: Callable[[str], None], *,
          given: Sequence[GivenTrial] | None = None, enqueued: Sequence[GivenTrial] = (), warm_starts: Sequence[str] = (),
          keep: Keep = "all", max_disk_bytes: int | None = None, autoscaling: bool = False,
          mlflow_uri: str | None = None, wandb_project: str | None = None) -> SweepResult:
    """Runs, resumes or extends the study in `directory` until its trials, or its time, are spent; then deletes the
    weights that `keep` does not name. With `autoscaling` trials wait for nodes that the cluster adds. `given` trials run
    instead of what the sampler makes of `space`, in their order but for those that wait for rounds of a running one; a longer
    list extends the study. `enqueued` ones run before the sampler's, which hears of the studies in `warm_starts`. Weights above
    `max_disk_bytes` are deleted as they come.

    Raises ValueError of one sentence for bad input, before anything is written.
    """
    ledger = Ledger(directory)
    loggers = Loggers(ledger, trackers(ledger.directory, mlflow_uri, wandb_project), echo)
    check_bucket(ledger.directory)
    study = resolve(study if given is None else study.replaced(num_trials=len(given)), echo)
    inputs = read_inputs(study, echo)
    check_objectives(study, inputs)
    # a mistake in the space is told before anything is written
    actions = sample_trials(study, space, inputs, 20) if given is None else []
    proposals = Proposals(space) if given is None else None
    methods = [*check_rule(study, space, inputs.num_train_tokens), *proposals.configs] if proposals else []
    for number, trial in enumerate(enqueued if given is None else given, start=1):
        if isinstance(trial, TrialConfig):
            actions.append(resolve_actions(trial, study, inputs.num_train_tokens))
        else:
            check_actions(trial, study, inputs.num_train_tokens, f"{'enqueued' if given is None else 'given'} trial {number}")
            actions.append(trial)
    check_parts([*methods, *(action for trial in actions for action in trial)], study)
    for earlier in warm_starts:
        check_warm_start(earlier, inputs.root_key)
    started = time.monotonic()
    recorded = ledger.study().study if ledger.holds_study() else None
    study = placed(study, recorded, work_of(study, actions), echo)
    with ledger.lock():
        if given is not None:
            check_given(given, ledger.trials())
        attached = ledger.attach(StudyRecord(study=study, space=space_name,
                                             space_hash=proposals.hash if proposals else GIVEN,
                                             root_key=inputs.root_key, provenance=provenance(device_name("cpu"))))
        mends: list[Job] = []
        if attached:
            ledger.delete_leftovers()
            mends = mend(ledger, echo)
            trials = ledger.trials()
            num_candidates = len({key for trial in trials for key in trial.keys})  # without the dense baseline and its control
            echo(f"resuming {ledger.directory}: {len(trials)} trials, {num_candidates} candidates so far")
        interrupted = False
        searcher = StudySearcher(ledger, study, space, inputs, echo, given, mends, proposals, loggers.show, enqueued,
                                 max_disk_bytes)
        for earlier in warm_starts if proposals else ():
            warm_start(searcher.sampler, proposals, earlier, echo)
        if searcher.has_work():
            echo(f"{study.search.num_trials} trials of {study.model.path}: starting Ray and a gang")
            start_ray(study, autoscaling)
            watches = not autoscaling and threading.current_thread() is threading.main_thread()  # which alone hears signals
            with watching_nodes(study, searcher) if watches else contextlib.nullcontext():
                interrupted = run_tune(ledger, study, searcher)
            if searcher.refusal:
                raise searcher.refusal
            ledger.delete_leftovers()
            if searcher.dense_failed:
                raise ValueError("the dense baseline could not be scored, so no trial can run: "
                                 + last_line(ledger.log_path(-1, 0)))
        loggers.show_all()
        if keep != "all" and not interrupted:
            delete_unneeded(ledger, study, keep, echo)
    trials = ledger.trials()
    keys = {key for trial in trials for key in trial.keys}
    return SweepResult(ledger.directory, interrupted, len(trials), len(keys),
                       sum(trial.status == "failed" for trial in trials), time.monotonic() - started)


WATCH_S = 5.0


class GivenUp(ValueError):
    """Nodes were lost, and none came that a gang fits."""


@contextlib.contextmanager
def watching_nodes(study: Study, searcher: StudySearcher) -> Iterator[None]:
    """While nodes are lost and no gang fits, says so, and ends the block with GivenUp after `wait_for_nodes_s`: Tune would
    wait for ever."""
    ended = threading.Event()

    given_up: list[str] = []

    def give_up(*_: object) -> None:
        given_up.append(f"no trial could run for {study.cluster.wait_for_nodes_s:g} s: {shortage(study)}; add nodes, or lower "
                        "num_ranks, and the same command goes on")
        raise KeyboardInterrupt  # which ends Tune

    def watch() -> None:
        began = None
        while not ended.wait(WATCH_S):
            short = shortage(study)
            if short and began is None:
                began = time.monotonic()
                searcher.waits(short)
            elif not short:
                began = None
            elif time.monotonic() - began > study.cluster.wait_for_nodes_s:
                os.kill(os.getpid(), signal.SIGUSR2)  # the main thread waits in Tune, which takes SIGUSR1 for itself
                return

    before = signal.signal(signal.SIGUSR2, give_up)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        if not given_up:
            raise
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGUSR2, before)
    if given_up:
        raise GivenUp(given_up[0])


def run_tune(ledger: Ledger, study: Study, searcher: StudySearcher) -> bool:
    """Runs Tune until the searcher has finished; True when it was interrupted before."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("TUNE_WARN_THRESHOLD_S", "60")
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # ours know the trials
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would save a state that nothing reads
    for name in ("ray.tune", "ray.train"):  # a trial's end has a line of ours, and a log with its traceback
        logging.getLogger(name).setLevel(logging.CRITICAL)
    trainable = tune.with_resources(
        tune.with_parameters(Gang, study=study, directory=str(ledger.directory), root_key=searcher.inputs.root_key),
        gang_resources(study))
    tune_folder = ledger.directory / "tune"
    filesystem, storage_path = ((tune_folder.filesystem, tune_folder.path) if isinstance(tune_folder, StorePath)
                                else (None, str(tune_folder)))
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1, max_concurrent_trials=study.search.max_concurrent,
                                    reuse_actors=True),
        run_config=tune.RunConfig(storage_path=storage_path, storage_filesystem=filesystem,
                                  name=time.strftime("%Y%m%d-%H%M%S"), verbose=0,
                                  checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                                  failure_config=tune.FailureConfig(max_failures=1)),
    )
    try:
        with ending_actors():
            tuner.fit()
    except TuneError as error:  # Tune has made text of what arose in the searcher: a store that refuses, a damaged record
        if isinstance(error.__context__, OSError | ValueError):
            raise error.__context__ from None
        raise
    except (KeyboardInterrupt, SystemExit):
        searcher.progress.echo("stopped by a signal; the same command goes on from the last finished round")
        raise
    return not searcher.finished
