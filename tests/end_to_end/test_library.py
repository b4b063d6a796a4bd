"""What a script calls: one trial, results, pick, export, load; the README's lines, with a sweep."""

import functools
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import analysis
import raysearch
from analysis.constraints import parse_constraints
from analysis.pick import pick

README = Path(__file__).parents[2] / "README.md"


def study(model: Path, corpus: Path) -> dict:
    return {"model": {"path": str(model)}, "data": {"corpus": str(corpus), "context_tokens": 64},
            "training": {"batch_tokens": 256}, "evaluation": {"tasks": ("text",), "num_items": 4}, "search": {"num_trials": 2}}


def test_a_trial_its_results_its_pick_and_its_export(tiny_model: Path, stories: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = raysearch.run_trial(study(tiny_model, stories), {"target_sparsity": 0.5}, tmp_path / "pruned", said.append)
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
    frame = analysis.load_study(tmp_path / "pruned")
    assert list(frame["sparsity"].round(2)) == [0.0, 0.5]
    picked = pick(frame, parse_constraints(max_bytes="1GB"))
    model = raysearch.load(raysearch.export(picked, tmp_path / "deploy", "sparse", said.append), backend="dense")
    assert sum(int((parameter == 0).sum()) for parameter in model.parameters()) >= picked.num_parameters - picked.num_nonzero
    with pytest.raises(ValueError, match="study: model.path: Field required"):
        raysearch.run_trial({"model": {}}, {}, tmp_path / "other")
    with pytest.raises(ValueError, match="study: model: Field required"):
        raysearch.sweep({"epochs": 3}, dict, tmp_path / "other")
    with pytest.raises(ValueError, match=r"space\(trial\): TypeError: 'Trial' object is not iterable; mend it"):
        raysearch.sweep(study(tiny_model, stories), functools.partial(dict), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_readmes_script(tiny_model: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                            capfd: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(block.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    given = re.sub(r"STUDY = .*", f"STUDY = {study(tiny_model, stories)}", block).replace("=0.5", "=9")
    names: dict[str, object] = {}
    exec(compile(given, "<string>", "exec"), names)  # so that space() has no source
    assert len(names["frame"]) >= 3
    assert (tmp_path / "deployed" / "config.json").is_file()
    out = "".join(capfd.readouterr())
    assert "trial 0 round 1/1" in out
    assert "9223372036854775807" not in out
    assert "infinite" not in out
