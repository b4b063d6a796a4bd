"""Whose weights stay when a study has ended."""

from collections.abc import Callable
from typing import Literal

from raysearch.config import Study, is_maximised
from raysearch.pruning.pareto import non_dominated
from raysearch.search.control import keys_of_controls_only, last_control
from raysearch.study.ledger import WEIGHTS, Ledger
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
    needed |= starts_of_running(ledger)
    num_files, num_bytes = ledger.delete_weights(sorted(set(ledger.rounds()) - needed))
    echo(f"--keep {keep}: deleted {num_files} files of weights, {human_bytes(num_bytes)}; records stay, and export computes "
         "weights again")


def delete_above(ledger: Ledger, study: Study, max_bytes: int, echo: Callable[[str], None]) -> None:
    """Where the weights take more than that, deletes some, oldest first, until they take a tenth less: those of no candidate on
    the frontier before the others, and none from which an unfinished trial goes on. What is wanted later is computed again."""
    stats = {path.parent.name: path.stat() for path in (ledger.directory / "rounds").glob(f"[!.]*/{WEIGHTS}")}
    held = sum(stat.st_size for stat in stats.values())
    if held <= max_bytes:
        return
    needed, on_front, deleted = starts_of_running(ledger), set(frontier_keys(ledger, study)), []
    for key in sorted(stats, key=lambda key: (key in on_front, stats[key].st_mtime)):
        if held > 0.9 * max_bytes and key not in needed:
            deleted.append(key)
            held -= stats[key].st_size
    num_files, num_bytes = ledger.delete_weights(deleted)
    num_front = len(on_front.intersection(deleted))
    echo(f"--max-disk {human_bytes(max_bytes)}: deleted {num_files} files of weights, {human_bytes(num_bytes)}"
         + f", {num_front} of them of the frontier" * bool(num_front) + "; what is wanted of them later is computed again")


def starts_of_running(ledger: Ledger) -> set[str]:
    """Keys of the candidates from which unfinished trials and controls go on."""
    root_key = ledger.study().root_key
    return {last_finished(ledger, root_key, trial) for trial in [*ledger.trials(), *ledger.controls()]
            if trial.status == "running"}


def last_finished(ledger: Ledger, root_key: str, trial: TrialRecord) -> str:
    """Key of the candidate from which a trial that runs again goes on."""
    key = root_key
    for action in trial.actions:
        following = round_key(key, action)
        if ledger.round(following) is None:
            return key
        key = following
    return key
