"""Whose weights stay when a study has ended."""

from collections.abc import Callable
from typing import Literal

from raysearch.config import Study, is_maximised
from raysearch.pruning.pareto import non_dominated
from raysearch.search.control import keys_of_controls_only, last_control
from raysearch.study.ledger import Ledger
from raysearch.study.records import TrialRecord, objective_values, round_key
from raysearch.units import human_bytes

Keep = Literal["frontier", "all", "none"]
"""Whose weights stay when a study has ended: those of the frontier on the selection split and of the last dense control,
everybody's, nobody's."""


def frontier_keys(ledger: Ledger, study: Study) -> list[str]:
    """Keys of the candidates that no other one beats in every objective on the selection split; never one that
    a race stopped, whose metrics (which the sampler does learn from) are of some items only, and never a dense control's."""
    objectives, controls = study.search.objectives, keys_of_controls_only(ledger)
    values = {record.key: objective_values(record, objectives) for record in ledger.rounds().values()
              if record.dominated_by is None and record.key not in controls}
    scored = {key: value for key, value in values.items() if value is not None}
    on_front = non_dominated(list(scored.values()), [is_maximised(name) for name in objectives])
    return [key for key, front in zip(scored, on_front) if front]


def delete_unneeded(ledger: Ledger, study: Study, keep: Keep, echo: Callable[[str], None]) -> None:
    """Deletes the weights of candidates that `keep` does not name and from which no unfinished trial goes on."""
    needed = set(frontier_keys(ledger, study)) if keep == "frontier" else set()
    if keep == "frontier" and (control := last_control(ledger)) is not None:
        needed.add(control.keys[-1])
    root_key = ledger.study().root_key
    for trial in [*ledger.trials(), *ledger.controls()]:
        if trial.status == "running":
            needed.add(last_finished(ledger, root_key, trial))
    num_files, num_bytes = ledger.delete_weights(sorted(set(ledger.rounds()) - needed))
    echo(f"--keep {keep}: deleted {num_files} files of weights, {human_bytes(num_bytes)}; records stay, and export computes "
         "weights again")


def last_finished(ledger: Ledger, root_key: str, trial: TrialRecord) -> str:
    """Key of the candidate from which a trial that runs again goes on."""
    key = root_key
    for action in trial.actions:
        following = round_key(key, action)
        if ledger.round(following) is None:
            return key
        key = following
    return key
