import contextlib
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from raysearch.config import Action, Metric, TrialConfig, study_of
from raysearch.study.files import new_directory, new_file, write_json
from raysearch.study.items import Items
from raysearch.study.ledger import Ledger
from raysearch.study.records import Provenance, StudyRecord, TrialRecord, root_key
from raysearch.study.storage import AnyPath

PROVENANCE = Provenance(created_at="2026-11-23T00:00:00+00:00", git_commit=None, versions={}, device="CPU", hostname="h")


def study_record(**changes: object) -> StudyRecord:
    study = study_of(**{"path": "/m", "num_trials": 4, **changes})
    return StudyRecord(study=study, space="s", space_hash="0", root_key=root_key(study, []), provenance=PROVENANCE)


def test_a_study_is_extended_but_not_exchanged(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert not ledger.attach(study_record())
    assert ledger.attach(study_record(num_trials=9))
    assert ledger.study().study.search.num_trials == 9
    with pytest.raises(ValueError, match=r"holds another study, which differs in weight_decay \('its default', now 0.1\)"):
        ledger.attach(study_record(weight_decay=0.1))
    assert ledger.study().study.training.weight_decay == 0.0
    assert ledger.attach(study_record(num_trials=9, num_ranks=4, zero_stage=2))  # how fast and where may change
    assert ledger.study().study.cluster.num_ranks == 4
    raced = study_record(racing_level=0.05, objectives=("stored_bytes", "text/bits_per_byte")).model_copy(
        update={"root_key": ledger.study().root_key})
    with pytest.raises(ValueError, match=r"differs in objectives \(num_nonzero, text/bits_per_byte, now stored_bytes"):
        ledger.attach(raced)
    with pytest.raises(ValueError, match="differs in the files of the model, the corpus or the tasks"):
        ledger.attach(study_record().model_copy(update={"root_key": "another"}))


def test_predicted_times_are_of_one_serving_and_of_every_candidate(tmp_path: Path) -> None:
    asked = {"objectives": ("predicted_ms", "text/bits_per_byte")}
    for name in ("without", "with"):
        (tmp_path / name).mkdir()
    Ledger(tmp_path / "without").attach(study_record())
    with pytest.raises(ValueError, match="differs in predicted_ms, which its candidates do not have"):
        Ledger(tmp_path / "without").attach(study_record(constraints={"predicted_ms": 3.0}))
    ledger = Ledger(tmp_path / "with")
    ledger.attach(study_record(**asked))
    with pytest.raises(ValueError, match=r"differs in serving \(batch_sequences=8 .* now batch_sequences=2 .*\), of which"):
        ledger.attach(study_record(**asked, batch_sequences=2))
    assert ledger.attach(study_record(batch_sequences=2))  # nothing asks any more


def test_a_study_of_format_1_is_refused_with_the_way_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.attach(study_record())
    told = json.loads((tmp_path / "study.json").read_text())
    del told["format"]
    told["provenance"]["versions"] = {"raysearch-llm": "0.1.0"}
    (tmp_path / "study.json").write_text(json.dumps(told))
    sentence = (r"its records are of format 1, and this raysearch reads and writes format 3 only; open it with the "
                r"raysearch-llm that made it \(0.1.0\), or start anew with another --out")
    for refused in (lambda: Ledger.open(tmp_path), lambda: ledger.attach(study_record())):
        with pytest.raises(ValueError, match=sentence):
            refused()


def test_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds something else \\(thesis.tex\\)"):
        Ledger(tmp_path).attach(study_record())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"), Ledger(tmp_path / "thesis.tex").lock():
        pass


@pytest.mark.parametrize(("content", "sentence"), [
    (None, r"holds no study \(study.json is missing\)"),
    ("{", r"not a StudyRecord of this version of raysearch"),
    ('{"study": 1}', r"not a StudyRecord of this version of raysearch"),
])
def test_opening_what_is_no_study(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        Ledger.open(tmp_path)
    with pytest.raises(ValueError, match="no such study directory"):
        Ledger.open(tmp_path / "nowhere")


def test_what_a_killed_process_left_aside_is_deleted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with contextlib.suppress(KeyboardInterrupt), new_directory(ledger.round_directory("abc")) as folder:
        kept = folder.rename(folder.with_name(".abc.kept"))  # as a kill would leave it
        (kept / "weights.safetensors").write_bytes(b"0" * 1000)
        raise KeyboardInterrupt
    with new_directory(ledger.round_directory("def")) as folder:
        (folder / "record.json").write_text("{}")
    ledger.delete_leftovers()
    assert [path.name for path in (tmp_path / "rounds").iterdir()] == ["def"]


def test_records_come_back_as_they_were(anywhere: AnyPath) -> None:
    ledger = Ledger(anywhere)
    assert (ledger.trials(), ledger.rounds(), ledger.report_records(), ledger.driver()) == ([], {}, {}, (False, ""))
    trial = TrialRecord(number=3, config=TrialConfig(target_sparsity=0.5), actions=(Action(sparsity=0.5),),
                        started_at="now", status="failed", reason="<b>&", keys=("k",))
    ledger.write_trial(trial)
    assert ledger.trials() == [trial]
    metrics = {"text/bits_per_byte": Metric(value=2.5, stderr=None, num_items=3)}
    items = {"text/bits_per_byte": Items(np.ones(3), np.array([4.0, 5, 6]), np.arange(3, dtype=np.uint64), np.arange(3))}
    assert ledger.items("k", "report") is None
    ledger.write_report_metrics("k", metrics, items)
    (name, columns), = ledger.items("k", "report").items()
    assert (name, [values.tolist() for values in columns]) == (
        "text/bits_per_byte", [[1, 1, 1], [4, 5, 6], [0, 1, 2], [0, 1, 2]])
    assert ledger.items("k", "selection") is None
    with new_file(ledger.items_path("k", "selection")) as file:
        file.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"items.selection.npz.*: not the items of a candidate \(it is no .npz, or"):
        ledger.items("k", "selection")
    assert ledger.report_metrics("k") == metrics
    assert ledger.report_metrics("other") is None
    assert {key: report.metrics for key, report in ledger.report_records().items()} == {"k": metrics}
    with pytest.raises(ValueError, match=r"00007.json.*: cannot be read \(No such file or directory\); is this"):
        ledger.trial(7)
    write_json(anywhere / "trials" / "00007.json", {"number": 7})
    with pytest.raises(ValueError, match=r"00007.json.*: not a TrialRecord of this version of raysearch \(Field required\)"):
        ledger.trial(7)
    assert ledger.trials() == [trial]
    assert [path.name for path in ledger.damaged] == ["00007.json"]


def test_a_study_anywhere_is_attached_to_and_locked(anywhere: AnyPath) -> None:
    ledger = Ledger(anywhere)
    with ledger.lock():
        assert not ledger.attach(study_record())
        assert ledger.attach(study_record(num_trials=9))
        assert ledger.driver() == (True, f"process {os.getpid()} on {socket.gethostname()}")
    assert ledger.driver() == (False, "")
    assert Ledger.open(anywhere).study().model_copy(update={"model_beside": None}) == study_record(num_trials=9)


def test_weights_are_deleted_and_counted_and_the_rest_stays(anywhere: AnyPath) -> None:
    ledger = Ledger(anywhere)
    for key, names in (("a", ["weights.safetensors", "weights.damaged", "record.json"]), ("b", ["weights.safetensors"])):
        for name in names:
            with new_file(ledger.round_directory(key) / name) as file:
                file.write_bytes(b"12345")
    assert ledger.delete_weights(["a", "nowhere"]) == (2, 10)
    assert sorted(str(path) for path in anywhere.glob("rounds/*/*")) == [
        str(ledger.deleted_path("a")), str(ledger.round_directory("a") / "record.json"), str(ledger.weights_path("b"))]


def test_the_stacks_of_a_trial_are_found_by_rank(anywhere: AnyPath) -> None:
    ledger = Ledger(anywhere)
    for number, rank, text in ((3, 0, "frames of 0"), (3, 12, "frames of 12"), (3, 1, ""), (4, 0, "another trial's")):
        with new_file(ledger.stack_path(number, rank)) as file:
            file.write_text(text)
    assert ledger.stacks(3) == {"rank 0": "frames of 0", "rank 12": "frames of 12"}
    assert ledger.stacks(5) == {}


def test_controls_stand_apart_from_trials(anywhere: AnyPath) -> None:
    ledger = Ledger(anywhere)
    trial = TrialRecord(number=0, config=TrialConfig(target_sparsity=0.5), actions=(Action(sparsity=0.5),), started_at="now")
    controls = [TrialRecord(number=number, config=None, actions=(Action(sparsity=0.0, finetune_tokens=-number),),
                            started_at="now") for number in (-2, -3, -10)]
    for record in (controls[2], trial, controls[0], controls[1]):
        ledger.write_trial(record)
    for path in (ledger.log_path(-1, 0), ledger.log_path(-2, 0), ledger.stack_path(-2, 0)):
        with new_file(path) as file:
            file.write_text("not a record")
    assert ledger.trials() == [trial]
    assert ledger.controls() == controls
    assert ledger.trial(-2) == controls[0]
    assert (anywhere / "trials" / "-0002.json").is_file()
    assert [record.name for record in (trial, controls[0])] == ["trial 0", "control"]
    assert ledger.stacks(-2) == {"rank 0": "not a record"}
