"""What a sweep does about a study that has lost files, before it asks for anything: the damaged ones are set aside, what was
written twice is written again, and what has to be computed becomes a job. What is whole is not touched."""

from collections.abc import Callable

from raysearch.study.damage import find_damage, has_copies, record_names, summarised
from raysearch.study.files import is_there, set_aside
from raysearch.study.ledger import Ledger
from raysearch.trial.rank import Job


def mend(ledger: Ledger, echo: Callable[[str], None]) -> list[Job]:
    """Names what is lost or damaged; the jobs for a gang, each a candidate that lacks something."""
    trials, rounds, reports = [*ledger.trials(), *ledger.controls()], ledger.rounds(), ledger.report_records()
    damages = find_damage(ledger, trials, rounds, reports, is_driver=True)
    for line in summarised(each.what for each in damages):
        echo(f"found {line}")
    for each in damages:
        # open_journal sets the journal aside, and study.json was just written
        if not each.is_stranger and is_there(each.path) and each.path.name not in ("journal.log", "study.json"):
            set_aside(each.path)
    if damages or not has_copies(ledger):
        ledger.restore(record_names(trials, rounds, reports))
    ledger.damaged.clear()
    lost = {each.key for each in (find_damage(ledger, trials, ledger.rounds(), ledger.report_records()) if damages else ())}
    trial_of = {key: trial.number for trial in reversed(trials) for key in trial.keys}
    keys = [key for key in [ledger.study().root_key, *trial_of] if key in lost]
    return [{"kind": "mend", "key": key, "trial": trial_of.get(key)} for key in keys]
