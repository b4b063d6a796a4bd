"""`raysearch finish`: a picked candidate trained longer with its masks held, as one more round of its chain, by Ray Train.

The round is a round like any other, computed and stored as those of a sweep, and its trial is a fork that nobody's sampler
proposed. Ray Train starts the ranks, and starts them again where one died, from the last checkpoint within the round.
"""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysearch.cluster.joining import start_ray
from raysearch.config import Action, TrialConfig, parse
from raysearch.replicate import chain
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import utc_now
from raysearch.study.records import TrialRecord, round_key
from raysearch.training.pretrain import fit
from raysearch.training.pretrain_worker import load_checkpoint, save_checkpoint
from raysearch.trial.actions import resolve_actions
from raysearch.trial.checkpoints import Checkpoints
from raysearch.trial.inputs import same_inputs
from raysearch.trial.rank import Rank

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
    trials, actions, following = ledger.trials(), (*before, action), round_key(key, action)
    number = next((trial.number for trial in trials if trial.actions == actions),
                  1 + max((trial.number for trial in trials), default=-1))
    cluster, place = study.cluster, ledger.directory / "finish" / following
    job = {"study": study.replaced(round_limit_s=NO_LIMIT_S), "directory": str(ledger.directory), "number": number,
           "root_key": described.root_key, "key": following, "every_s": checkpoint_every_s}
    with ledger.lock():
        if number not in {trial.number for trial in trials}:
            ledger.write_trial(TrialRecord(number=number, config=None, actions=actions, forked_at=len(before), is_finish=True,
                                           started_at=utc_now()))
        if ledger.trial(number).status != "done" or ledger.report_metrics(following) is None:
            start_ray(study)
            echo(f"training candidate {key} on {action.finetune_tokens:,} tokens more as trial {number}; rank 0 prints to "
                 f"{ledger.log_path(number, 0)}")
            fit(finish_loop, job, cluster.num_ranks, {"CPU": cluster.cpus_per_rank, "GPU": cluster.gpus_per_rank}, place)
    trial = ledger.trial(number)
    if trial.status != "done":
        raise ValueError(f"the round was not finished: {trial.reason}; try a lower --learning-rate")
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
    return trial


def finishing(before: tuple[Action, ...], epochs: float, learning_rate: float | None, distill_alpha: float,
              resolve: Callable[[TrialConfig], tuple[Action, ...]]) -> Action:
    """The round behind these: no weight is pruned that was not, the text goes on where they ended, the learning rate and its
    path are those of the last that trained, unless another one is given."""
    if epochs <= 0:
        raise ValueError(f"epochs must be above 0, got {epochs:g}")
    last = next((action for action in reversed(before) if action.finetune_tokens), None)
    rate = learning_rate or (last.learning_rate if last else None)
    if rate is None:
        raise ValueError("the candidate was never fine-tuned, so it has no learning rate; give --learning-rate")
    fields = {"target_sparsity": 0.0, "finetune_epochs": epochs, "learning_rate": rate, "distill_alpha": distill_alpha,
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
