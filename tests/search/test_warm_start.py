"""What an earlier study tells a new one."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from synthetic_study import ROOT, SyntheticStudy
from test_searcher import run_to_the_end, searcher, space

from raysearch.search.sampler import NUM_WHOLE, Sampler
from raysearch.search.space import Proposals
from raysearch.search.warm_start import check_warm_start, warm_start


@pytest.fixture
def earlier(tmp_path: Path) -> SyntheticStudy:
    """A finished one of two forks."""
    study = SyntheticStudy(tmp_path / "earlier")
    run_to_the_end(searcher(study, NUM_WHOLE + 2, []), study)
    return study


def told(sampler: Sampler) -> tuple[int, int]:
    assert sampler.forks is not None
    return len(sampler.heard.trials), len(sampler.forks._steps)


def test_the_sampler_hears_of_its_trials_and_forks_and_the_journal_does_not(earlier: SyntheticStudy) -> None:
    settings, said = earlier.ledger.study().study, []
    new = Sampler(optuna.create_study(directions=["minimize"] * 2), settings, space)
    warm_start(new, Proposals(space), earlier.ledger.directory, said.append)
    assert told(new) == (NUM_WHOLE, 2 * NUM_WHOLE + 2)
    assert f"hears of {3 * NUM_WHOLE + 2} observations from its {NUM_WHOLE + 2} trials" in said[0]
    assert (new.journal.trials, new.num_asked, new.forks.frontier) == ([], 0, [])
    new.observe(None, earlier.ledger.candidate(ROOT))
    assert new.ask().number == 0


def test_of_parameters_that_the_new_space_draws_from_something_else_the_rounds_alone_are_heard(earlier: SyntheticStudy) -> None:
    def wider(trial: optuna.Trial) -> dict[str, Any]:
        return {"schedule": "linear", "num_rounds": 2, "target_sparsity": trial.suggest_float("target_sparsity", 0.1, 0.95)}

    new = Sampler(optuna.create_study(directions=["minimize"] * 2), earlier.ledger.study().study, wider)
    warm_start(new, Proposals(wider), earlier.ledger.directory, lambda line: None)
    assert told(new) == (0, 2 * NUM_WHOLE + 2)


def test_another_model_is_refused(earlier: SyntheticStudy, tmp_path: Path) -> None:
    check_warm_start(earlier.ledger.directory, ROOT)
    with pytest.raises(ValueError, match=r"--warm-start .*earlier: is a study of another model, corpus, tasks or settings"):
        check_warm_start(earlier.ledger.directory, "another")
    with pytest.raises(ValueError, match="no such study directory"):
        check_warm_start(tmp_path / "nowhere", ROOT)
