"""`raysearch finish`: a picked candidate trained longer with its masks held, as one more round of its chain, by Ray Train.

The round is a round like any other, computed and stored as those of a sweep, and its trial is a fork that nobody's sampler
proposed. Ray Train starts the ranks, and starts them again where one died, from the last checkpoint within the round.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

from raysearch.cluster.joining import start_ray
from raysearch.config import Action, TrialConfig
from raysearch.frozen import parse
from raysearch.replicate import chain
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import utc_now
from raysearch.study.records import TrialRecord, round_key
from raysearch.study.storage import StorePath
from raysearch.training.pretrain import fit
from raysearch.training.pretrain_worker import load_checkpoint, save_checkpoint
from raysearch.trial.actions import resolve_actions
from raysearch.trial.checkpoints import Checkpoints
from raysearch.trial.inputs import same_inputs
from raysearch.trial.rank import Rank
from raysearch.trial.run import number_of

NO_LIMIT_S = 1e9
"""Of a round that is long on purpose."""


def finish(directory: str, key: str, epochs: float, echo: Callable[[str], None], *, learning_rate: float | None = None,
           distill_alpha: float = 0.0, checkpoint_every_s: float = 60.0) -> TrialRecord:
    """Trains the candidate for so many epochs more, and scores the new one on both splits; its trial, whose last key it is.
    The same call finds what is done of it.

    ValueError of one sentence for settings that make no round, for a study whose files are others now, and for a round that
    failed; RuntimeError where workers died too often.
    """
    ledger = Ledger.open(directory)
    described = ledger.study()
    study, before = described.study, chain(ledger, key)
    inputs = same_inputs(described, f"candidate {key}: it cannot be trained further")
    action = finishing(before, epochs, learning_rate, distill_alpha,
                       functools.partial(resolve_actions, study=study, num_train_tokens=inputs.num_train_tokens))
    actions, following = (*before, action), round_key(key, action)
    cluster, place = study.cluster, ledger.directory / "finish" / following
    with ledger.lock():
        trials = {trial.number: trial for trial in ledger.trials()}
        number = number_of(actions, list(trials.values()))
        known = trials.get(number)
        if known is None or known.status != "done" or ledger.report_metrics(following) is None:
            start_ray(study)
            if known is None:
                ledger.write_trial(TrialRecord(number=number, config=None, actions=actions, forked_at=len(before),
                                               is_finish=True, started_at=utc_now()))
            echo(f"training candidate {key} on {action.finetune_tokens:,} tokens more as trial {number}; rank 0 prints to "
                 f"{ledger.log_path(number, 0)}")
            job = {"study": study.replaced(round_limit_s=NO_LIMIT_S), "directory": str(ledger.directory), "number": number,
                   "root_key": described.root_key, "key": following, "every_s": checkpoint_every_s}
            try:
                fit(finish_loop, job, cluster.num_ranks, {"CPU": cluster.cpus_per_rank, "GPU": cluster.gpus_per_rank}, place)
            except RuntimeError as error:  # processes that died could not write it
                ledger.write_trial(ledger.trial(number).model_copy(
                    update={"status": "failed", "crashed": True, "reason": str(error), "ended_at": utc_now()}))
                raise
    trial = ledger.trial(number)
    if trial.status != "done":
        raise ValueError(f"the round was not finished: {trial.reason}; try a lower --learning-rate")
    with contextlib.suppress(FileNotFoundError):
        place.filesystem.delete_dir(place.path) if isinstance(place, StorePath) else shutil.rmtree(place)
    return trial


def finishing(before: tuple[Action, ...], epochs: float, learning_rate: float | None, distill_alpha: float,
              resolve: Callable[[TrialConfig], tuple[Action, ...]]) -> Action:
    """The round behind these: no weight is pruned that was not, the text goes on where they ended, the learning rate and its
    path are those of the last that trained, unless another one is given."""
    if epochs <= 0:
        raise ValueError(f"epochs must be above 0, got {epochs:g}")
    last = next((action for action in reversed(before) if action.finetune_tokens), None)
    if learning_rate is None and last is None:
        raise ValueError("the candidate was never fine-tuned, so it has no learning rate; give --learning-rate")
    fields = {"target_sparsity": 0.0, "finetune_epochs": epochs, "distill_alpha": distill_alpha,
              "learning_rate": last.learning_rate if last and learning_rate is None else learning_rate,
              "temperature": last.temperature if last and distill_alpha else 1.0,
              "lr_schedule": last.lr_schedule if last else "cosine"}
    (action,) = resolve(parse(TrialConfig, fields, "finish"))
    return action.model_copy(update={"data_start_tokens": sum(each.finetune_tokens for each in before)})


def finish_loop(job: dict[str, Any]) -> None:
    """What every worker of Ray Train runs."""
    rank = Rank(job["study"], job["directory"], job["root_key"], {"RANK": os.environ["RANK"]})
    rank.worker.checkpoints = Checkpoints(job["key"], job["every_s"], save_checkpoint, load_checkpoint)
    rank.begin({"kind": "trial", "number": job["number"]})
    while not (result := rank.step())["done"]:
        pass
    if result["status"] == "done":
        rank.begin({"kind": "report", "key": job["key"]})
        rank.step()
