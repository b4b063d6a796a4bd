from pathlib import Path

import pandas as pd
import pytest
from synthetic_study import twelve_trials

from analysis.load import load


@pytest.fixture(scope="session")
def study_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study of `twelve_trials`; read only."""
    return twelve_trials(tmp_path_factory.mktemp("study"))


@pytest.fixture
def frame(study_directory: Path) -> pd.DataFrame:
    return load(study_directory)


@pytest.fixture(scope="session")
def controlled_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a dense control; read only."""
    return twelve_trials(tmp_path_factory.mktemp("controlled"), controlled=True)


@pytest.fixture
def controlled(controlled_directory: Path) -> pd.DataFrame:
    return load(controlled_directory)
