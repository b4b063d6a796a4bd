"""`raysearch replicate`: a picked candidate's chain of rounds again with other seeds, for how much of its numbers is luck.

The chains are trials of a study of their own, DIR/replicas, with the same dense baseline and so the same keys: what a seed has
computed is found there again, and the search, its frontier and what is picked know nothing of it.
"""

from collections.abc import Callable

from raysearch.config import Action, Metric
from raysearch.prune import run_here
from raysearch.study.files import new_file
from raysearch.study.ledger import Ledger
from raysearch.trial.actions import looks_at_text
from raysearch.trial.round import report_round
from raysearch.trial.worker import lone_worker

REPLICAS = "replicas"


def replicate(directory: str, key: str, num_seeds: int, echo: Callable[[str], None]) -> list[dict[str, Metric]]:
    """On the report split, what each of `num_seeds` other seeds makes of the candidate's chain; without those that diverged,
    of which `echo` gets a line. ValueError for a candidate whose rounds read no text, and where the study's files are others.
    """
    ledger = Ledger.open(directory)
    record, actions = ledger.candidate(key), chain(ledger, key)
    if reseeded(actions, 1) == actions:
        raise ValueError(f"candidate {key}: its rounds read no text, so every seed gives the same one; replicate one that was "
                         "fine-tuned or calibrated")
    worker = lone_worker(ledger, record, "its rounds cannot be run again")
    worker.ledger = replicas = Ledger(ledger.directory / REPLICAS)
    found, keys = [], set()
    with replicas.lock():
        replicas.attach(ledger.study().model_copy(update={"space": REPLICAS, "space_hash": ""}))
        share_dense(ledger, replicas)
        for number in range(1, num_seeds + 1):
            name = f"seed {max(action.seed for action in reseeded(actions, number))}"
            trial = run_here(worker, None, reseeded(actions, number), lambda line: echo(f"{name}: {line}"))  # noqa: B023
            keys.update(trial.keys)
            if trial.status == "failed":
                echo(f"{name}: left out, for it failed in {trial.reason}")
                continue
            found.append(report_round(worker, replicas.candidate(trial.keys[-1])))
        replicas.delete_weights(keys)
    return found


def chain(ledger: Ledger, key: str) -> tuple[Action, ...]:
    """The actions from the dense model to a candidate, of forks and whole trials alike."""
    record = ledger.candidate(key)
    if record.parent is None or record.action is None:
        return ()
    return (*chain(ledger, record.parent), record.action)


def reseeded(actions: tuple[Action, ...], number: int) -> tuple[Action, ...]:
    """With another order of the text, other calibration sequences and other dropout, where a round has them."""
    return tuple(action.model_copy(update={"seed": action.seed + number}) if action.finetune_tokens or looks_at_text(action)
                 else action for action in actions)


def share_dense(ledger: Ledger, replicas: Ledger) -> None:
    """What the study knows of its dense baseline, of which no weights are stored; the record last."""
    key = ledger.study().root_key
    if (latency := ledger.latency()) is not None:
        replicas.write_twice("latency.json", latency)
    if replicas.round(key) is None and ledger.round(key) is not None:
        for file in sorted(ledger.round_directory(key).glob("*"), key=lambda file: file.name == "record.json"):
            with new_file(replicas.round_directory(key) / file.name) as copy:
                copy.write_bytes(file.read_bytes())
        replicas.restore([f"rounds/{key}/record.json", f"rounds/{key}/report.json"])
