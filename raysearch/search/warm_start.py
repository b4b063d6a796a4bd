"""What an earlier study of the same model tells a new one."""

from collections.abc import Callable

import optuna
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from raysearch.search.journal import from_records
from raysearch.search.sampler import Sampler
from raysearch.search.space import Proposals
from raysearch.study.ledger import Ledger
from raysearch.study.storage import AnyPath


def check_warm_start(directory: str | AnyPath, root_key: str) -> None:
    """ValueError where the numbers of the study there cannot be compared with those of one with this dense baseline."""
    if Ledger.open(directory).study().root_key != root_key:
        raise ValueError(f"--warm-start {directory}: is a study of another model, corpus, tasks or settings that decide "
                         "numbers, so that its values cannot be compared with this one's; leave it out")


def warm_start(sampler: Sampler, proposals: Proposals, directory: str | AnyPath, echo: Callable[[str], None]) -> None:
    """The sampler hears of the trials in `directory` whose parameters this space has, forks included. They are no trials of the
    new study and no parents."""
    ledger = Ledger.open(directory)
    records = ledger.trials()
    journal = optuna.create_study(directions=sampler.journal.directions)
    journal.add_trials(from_records(ledger, sampler.study, records))
    earlier = Sampler(journal, sampler.study, sampler.space, num_train_tokens=sampler.num_train_tokens)
    if (dense := ledger.round(ledger.study().root_key)) is not None:
        earlier.observe(None, dense)
    for record in records:
        earlier.recall(record, ledger.round)

    def fits(trial: FrozenTrial) -> bool:
        return bool(trial.params) and all(distribution_to_json(each) in proposals.distributions.get(name, ())
                                          for name, each in trial.distributions.items())

    def hears(new: optuna.Study, old: optuna.Study) -> int:
        told = [trial for trial in old.get_trials(states=[TrialState.COMPLETE]) if fits(trial)]
        new.add_trials(told)
        return len(told)

    num_told = hears(sampler.heard, earlier.heard)
    if sampler.forks is not None and earlier.forks is not None:
        num_told += sampler.forks.learn_from(earlier.forks)
    echo(f"--warm-start {directory}: the sampler hears of {num_told} observations from its {len(records)} trials")
