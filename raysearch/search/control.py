"""The dense control: the longest trial's fine-tuning on the dense model, without pruning.

Candidates are fine-tuned further than the dense model, so a lightly pruned one may beat it without pruning having helped. The
control tells the two apart. It is a baseline and no candidate: the sampler never hears of it, and it is on no frontier.
"""

from raysearch.config import Study
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import utc_now
from raysearch.study.records import TrialRecord
from raysearch.trial.actions import control_actions, longest

FIRST = -2
"""Number of a study's first control; those that follow count downwards."""


def due_control(ledger: Ledger, study: Study) -> TrialRecord | None:
    """The control that the study needs and has not finished, as it is to run: one of the ledger again, or a new one.

    The longest trial is the one with most fine-tuning in its finished rounds: what a failed one never trained, no candidate
    gained from. None where nothing was fine-tuned, and where `dense_control` is off.
    """
    if not study.search.dense_control:
        return None
    actions = control_actions(longest([trial.actions[:len(trial.keys)] for trial in ledger.trials()]))
    if not actions:
        return None
    controls = ledger.controls()
    same = next((control for control in controls if control.actions == actions), None)
    if same is not None:
        again = {"status": "running", "reason": None, "traceback": None, "ended_at": None}
        return None if same.status == "done" else same.model_copy(update=again)
    return TrialRecord(number=FIRST - len(controls), config=None, actions=actions, started_at=utc_now())


def give_up_others(ledger: Ledger, due: TrialRecord) -> None:
    """Records unfinished controls other than `due` as stopped: since they began, another trial has become the longest."""
    for control in ledger.controls():
        if control.status == "running" and control.number != due.number:
            ledger.write_trial(control.model_copy(update={
                "status": "stopped", "reason": "another trial is the longest now", "ended_at": utc_now()}))


def last_control(ledger: Ledger) -> TrialRecord | None:
    """The newest one that is finished."""
    return next((control for control in reversed(ledger.controls()) if control.status == "done"), None)


def keys_of_controls_only(ledger: Ledger) -> set[str]:
    """Of rounds that no trial made."""
    controls = {key for control in ledger.controls() for key in control.keys}
    return controls - {key for trial in ledger.trials() for key in trial.keys} if controls else controls
