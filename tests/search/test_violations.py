"""What a candidate misses of its constraints, by hand, and that the search learns it."""

import optuna
import pytest
from synthetic_study import ROOT
from test_forks import STUDY, TOKENS, candidate, rates, trained

from raysearch.config import SearchSettings
from raysearch.search.forks import Forks
from raysearch.search.sampler import Sampler
from raysearch.search.violations import violations
from raysearch.study.records import TrialRecord

DENSE = candidate(ROOT, 0.0, 0)


def test_sizes_go_down_accuracies_up_and_drops_are_against_dense() -> None:
    search = SearchSettings(constraints={"num_nonzero": 500, "last_word/acc": 0.5, "text/bits_per_byte": 2.5, "arc/acc": 0.9},
                            max_drop={"last_word/acc": 5.0, "text/bits_per_byte": 0.1})
    assert violations(candidate("a", 0.5, 1), DENSE, search) == pytest.approx({  # accuracy 0.525, bits 2.15
        "num_nonzero": (600 - 500) / 500, "last_word/acc": (0.5 - 0.525) / 0.5, "text/bits_per_byte": (2.15 - 2.5) / 2.5,
        "max_drop last_word/acc": (0.075 - 0.05) / 0.6, "max_drop text/bits_per_byte": (0.15 - 0.1) / 2.0})
    assert set(violations(candidate("a", 0.5, 1), None, search)) == {"num_nonzero", "last_word/acc", "text/bits_per_byte"}


def test_a_candidate_that_is_too_large_is_a_parent_and_one_that_is_too_bad_is_none() -> None:
    made = Forks(STUDY, rates, TOKENS, seed=0)
    made.observe(DENSE, (), {"stored_bytes": 0.5, "max_drop last_word/acc": -0.1})
    made.observe(candidate("a", 0.3, 1), trained(0.3), {"stored_bytes": 0.25, "max_drop last_word/acc": -0.05})
    made.observe(candidate("b", 0.6, 1), trained(0.6), {"stored_bytes": 0.1, "max_drop last_word/acc": 0.01})
    assert [parent.record.key for parent in made.frontier] == [ROOT, "a"]
    assert [list(target[2:]) for target in made._targets] == [[0.25, -0.05], [0.1, 0.01]]  # the model hears of all


def test_the_journal_shows_what_a_trial_missed() -> None:
    study = STUDY.replaced(constraints={"num_nonzero": 400})
    made = Sampler(optuna.create_study(directions=["minimize"] * 2), study, rates, num_train_tokens=TOKENS)
    made.observe(None, DENSE)
    asked = made.ask()
    made.observe(0, candidate("a", 0.5, 3))
    made.end(TrialRecord(number=0, config=asked.config, actions=asked.actions, keys=("x", "y", "a"), status="done",
                         started_at=""))
    assert made.journal.trials[0].constraints == {"diverged": -1.0, "num_nonzero": 0.5}
    assert made.journal.best_trials == []
