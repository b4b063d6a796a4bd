import re
from pathlib import Path

import pytest
import synthetic_study
from commands import Run
from synthetic_study import SyntheticStudy

from analysis.load import load
from analysis.paper import DROPS, RATES, paper_tables


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whose last words are called LAMBADA."""
    made = synthetic_study.metrics
    monkeypatch.setattr(synthetic_study, "metrics", lambda *given, **named: {
        name.replace("last_word", "lambada"): metric for name, metric in made(*given, **named).items()})
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.125, 0.36, 0.9], report=True)  # of the prunable weights, which are 0.8 of all
    return tmp_path / "study"


def test_drops_of_the_own_dense_model(study: Path) -> None:
    lines = paper_tables(load(study)).splitlines()
    assert len([line for line in lines if re.match(r" *0\.\d ", line)]) == len(DROPS) * len(RATES)
    (first,) = [line.split() for line in lines if "lambada/acc" in line and line.split()[0] == "0.1"]
    assert first[:6] == ["0.1", "0/1", "900k", "of", "1M", "855M"]
    loss = 100 * (0.3 * 0.125**2 + 0.005)  # of dense 0.59
    assert first[7:9] == ["0.59", f"{0.59 - loss / 100:.4g}"]
    assert float(first[9]) == pytest.approx(loss, abs=0.01)
    (missing,) = [line.split() for line in lines if "lambada/acc" in line and line.split()[0] == "0.5"]
    assert missing[1] == "-"  # the next is at 0.72
    (perplexity,) = [line for line in lines if "lambada/perplexity" in line and line.split()[0] == "0.3"]
    assert perplexity.count("%") == 2
    assert any("nq_open" in line and line.endswith("5.11 or 7.15") for line in lines)


def test_the_command(study: Path, run: Run, tmp_path: Path, study_directory: Path) -> None:
    code, out, err = run("report", study, "--paper")
    assert (code, "not comparable" in out) == (0, True), err
    assert not (study / "report.html").exists()
    assert "none of the paper's tasks is scored on the report split" in run("report", study_directory, "--paper")[2]
