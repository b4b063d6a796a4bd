"""Search spaces, draws from them, and lists of given trials: each mistake is one sentence."""

import ast
import re
import sys
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest

import search_spaces
from raysearch.config import Action, Budget, Scope, Study, TrialConfig, study_of
from raysearch.frozen import parse
from raysearch.pruning.criteria import CRITERIA
from raysearch.pruning.patterns import PATTERNS
from raysearch.search.sampler import Sampler
from raysearch.search.space import Proposals, check_given, draw, load_space, read_trials, sample_trials, space_hash
from raysearch.study.records import TrialRecord
from raysearch.trial.inputs import Inputs

STUDY = study_of(path="m", batch_tokens=256, context_tokens=64)
INPUTS = Inputs("root", 10**6, {}, None)


def space(trial: optuna.Trial) -> dict[str, Any]:
    """What varies."""
    return {"target_sparsity": trial.suggest_float("target_sparsity", 0.1, 0.9)}


def one_of_two_modes(trial: optuna.Trial) -> dict[str, Any]:
    if trial.suggest_categorical("mode", ["target", "threshold"]) == "target":
        return {"target_sparsity": trial.suggest_float("target_sparsity", 0.1, 0.9)}
    return {"threshold": trial.suggest_float("threshold", 0.1, 1.0), "threshold_unit": "std"}


# ---- spaces ----


def test_a_space_is_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_space.py").write_text("STUDY = {'model': {'path': 'm'}, 'search': {'num_trials': 3}}\n"
                                              "def space(trial):\n    return {}\n")
    study, found = load_space("my_own_space")
    assert (study, found(None)) == (study_of(path="m", num_trials=3), {})


def test_a_study_of_format_1_is_refused_with_the_nested_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat_space.py").write_text("STUDY = {'model': 'm', 'eval_items': 3, 'num_ranks': 2, 'size': 'stored_bytes'}\n"
                                            "def space(trial):\n    return {}")
    with pytest.raises(ValueError, match="its STUDY has no sections, as before format 2; give STUDY = ") as caught:
        load_space("flat_space")
    pasted = str(caught.value).partition("give STUDY = ")[2]
    assert parse(Study, ast.literal_eval(pasted), "x") == study_of(
        path="m", num_items=3, num_ranks=2, objectives=("stored_bytes", "text/bits_per_byte"))


SPACE = """
HIGH, MODES, EPOCHS = 0.9, ["linear", "cubic"], 1.0

def epochs(trial):
    return EPOCHS * trial.suggest_int("epochs", 1, 4)

def space(trial):
    return {"target_sparsity": trial.suggest_float("s", 0.1, HIGH), "finetune_epochs": epochs(trial), "num_rounds": 2,
            "schedule": trial.suggest_categorical("schedule", MODES)}
"""


@pytest.mark.parametrize(("before", "after", "is_another"), [
    ("HIGH,", "HIGH ,", False), ("def space(trial):", "def space(trial):  # a comment", False),
    ("0.1, HIGH)", "0.1, 0.9)", False), ("EPOCHS = 0.9", "EPOCHS = 0.8", True), ('"cubic"]', '"cosine"]', True),
    ('["linear", "cubic"]', '["cubic", "linear"]', True), ("1.0\n", "1.5\n", True), ("1, 4)", "1, 5)", True),
    ('"s", ', '"t", ', True), ('"num_rounds": 2', '"num_rounds": 3', True),
    ('"num_rounds": 2', '"l1_lambda": 1e-5, "num_rounds": 2', True)])
def test_a_space_is_known_by_what_it_proposes(before: str, after: str, is_another: bool) -> None:
    hashes = []
    for text in (SPACE, SPACE.replace(before, after)):
        names: dict[str, Any] = {}
        exec(text, names)  # no file has its source
        hashes.append(space_hash(names["space"]))
    assert before in SPACE
    assert (hashes[0] != hashes[1]) == is_another


def test_each_trial_is_checked_against_the_studys_space() -> None:
    high = 0.9

    def space(trial: optuna.Trial) -> dict[str, Any]:
        first = trial.suggest_float("first", 0.1, high)
        return {"target_sparsity": first, "initial_sparsity": trial.suggest_float("second", 0, first)}  # of any bounds

    proposals = Proposals(space)
    sampler = Sampler(optuna.create_study(directions=["minimize"] * 2), STUDY, space, proposals=proposals)
    assert sampler.ask().config.initial_sparsity < 0.9
    high = 0.8
    assert re.search(r"draws first from .*0.8.*, and the study's space from .*0.9.*; a space must always",
                     str(sampler.ask().error))


def test_new_settings_change_no_study_that_does_without_them() -> None:
    assert space_hash(load_space("search_spaces.demo")[1]) == "a8b28fcdb92eb8cc"
    known = space_hash(lambda trial: {"target_sparsity": 0.5})
    assert space_hash(lambda trial: {"target_sparsity": 0.5, "budget": "uniform"}) == known
    assert space_hash(lambda trial: {"target_sparsity": 0.5, "scope": "layer"}) != known
    assert space_hash(lambda trial: {"target_sparsity": 0.5, "scope": "layer", "budget": "erdos_renyi"}) != known


def test_every_method_is_in_one_space_and_each_draw_is_resolved() -> None:
    study, space = load_space("search_spaces.all_methods")
    actions = [action for trial in sample_trials(study, space, Inputs("", 10**8, {}, None), 500) for action in trial]
    assert {action.criterion for action in actions} == set(CRITERIA)
    assert {action.pattern for action in actions} == {*PATTERNS, "2:4", "4:8", "1:4"}
    assert {action.budget for action in actions} == set(get_args(Budget))
    assert {action.scope for action in actions} == set(get_args(Scope))
    assert {bool(action.distill_alpha) for action in actions} == {True, False}
    assert len({hash(action) for action in actions}) > 400


def test_draws_are_resolved_and_the_same_twice() -> None:
    trials = sample_trials(STUDY, one_of_two_modes, INPUTS, 20)
    assert trials == sample_trials(STUDY, one_of_two_modes, INPUTS, 20)
    assert {actions[0].threshold is None for actions in trials} == {True, False}
    assert all(len(actions) == 1 for actions in trials)


@pytest.mark.parametrize(("body", "sentence"), [
    ("return {}['x']", "FILE, line 3: KeyError: 'x'; mend it"),
    ("return helper(trial)", "FILE, line 5: parameter 'target_sparsity': ValueError: `low <= high` must hold, but got "
                             "(low=0.9, high=0.1); mend it"),
    ("trial.suggest_float('lr', 0.0, 1.0, log=True)", "FILE, line 3: parameter 'lr': ValueError: `low > 0` must hold"),
    ("trial.suggest_int('n', 1, 'x')", "FILE, line 3: parameter 'n': TypeError: "),
    ("return {'num_rounds': trial.suggest_int('n', 1, 2), 'rate': 1 / 0}", "FILE, line 3: ZeroDivisionError: "),
])
def test_an_error_in_the_users_space_names_file_line_and_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str,
                                                                   sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"erring_{abs(hash(body))}.py"
    file.write_text(f"STUDY = {{'model': {{'path': 'm'}}}}\ndef space(trial):\n    {body}\ndef helper(trial):\n"
                    "    return {'target_sparsity': trial.suggest_float('target_sparsity', 0.9, 0.1)}\n")
    with pytest.raises(ValueError, match=re.escape("space(trial): " + sentence.replace("FILE", str(file)))) as caught:
        sample_trials(STUDY, load_space(file.stem)[1], INPUTS, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "sentence"), [
    ("STUDY = {\n'model': MISSING}", "FILE, line 2: NameError: name 'MISSING' is not defined; mend it"),
    ("STUDY = {}\ndef space(:", "FILE, line 2: SyntaxError: "),
    ("def space(trial):\nreturn {}", "FILE, line 2: IndentationError: "),
    ("import nothing_of_that_name", "FILE, line 1: ModuleNotFoundError: No module named 'nothing_of_that_name'; mend it"),
    ("raise SystemExit(3)", "FILE, line 1: SystemExit: 3; mend it"),
])
def test_an_error_at_import_names_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str,
                                                sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"unimportable_{abs(hash(text))}.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"cannot be imported: {sentence.replace('FILE', str(file))}")):
        load_space(file.stem)
    with pytest.raises(ValueError, match="search space nowhere.at_all: cannot be imported: .*; give a module such as"):
        load_space("nowhere.at_all")


def test_a_local_module_comes_before_an_installed_package_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                           ) -> None:
    monkeypatch.chdir(tmp_path)
    path_before = list(sys.path)
    monkeypatch.setattr(search_spaces, "__path__", list(search_spaces.__path__))  # as installed
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces" / "kin.py").write_text("STUDY = {'model': {'path': 'of kin'}}")
    (tmp_path / "search_spaces" / "mine.py").write_text("from search_spaces.kin import STUDY\n"
                                                         "from search_spaces.demo import space\n")
    assert load_space("search_spaces.mine")[0].model.path == "of kin"
    assert sys.path == path_before


def test_a_space_without_a_source_counts_by_its_code() -> None:
    def made(text: str) -> Any:
        names: dict[str, Any] = {}
        exec(text, names)
        return names["space"]

    text = "def space(trial):\n    return {'rate': [0.1 for _ in range(2)][0]}"
    assert space_hash(made(text)) == space_hash(made(f"# moved\n\n{text}")) != space_hash(made(text.replace("0.1", "0.2")))
    assert space_hash(made("space = lambda trial: {}")) != space_hash(made("space = lambda trial: {'rate': 0.1}"))


@pytest.mark.parametrize(("fields", "sentence"), [
    ([0.5], "space(trial) must return a dict of trial settings, got list"),
    ({"sparsity": 0.5}, "space(trial): sparsity: no such field; the fields are schedule, "),
    ({"threshold": 0.1, "target_sparsity": 0.5}, "space(trial): threshold and target_sparsity contradict each other"),
])
def test_a_draw_that_contradicts_itself_is_refused(fields: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        draw(lambda trial: fields, optuna.create_study().ask())


# ---- given trials ----


def test_trials_are_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    file.write_text('{"target_sparsity": 0.5}\n\n  \n{"threshold": 0.1, "threshold_unit": "std"}\r\n{}', encoding="utf-8")
    assert read_trials(file) == [TrialConfig(target_sparsity=0.5), TrialConfig(threshold=0.1, threshold_unit="std"),
                                 TrialConfig()]
    file.write_text('[{"sparsity": 0.3}, {"sparsity": 0.5, "criterion": "movement"}]\n{}')
    assert read_trials(file) == [(Action(sparsity=0.3), Action(sparsity=0.5, criterion="movement")), TrialConfig()]


@pytest.mark.parametrize(("content", "sentence"), [
    (b"", "FILE: holds no trial; give one object of trial settings in each line"),
    (b" \n\n", "FILE: holds no trial; give one object of trial settings in each line"),
    (b'{"target_sparsity": 0.5}\n\n{"target_spar', "FILE, line 3: is not JSON (Unterminated string"),
    (b'{"target_sparsity": 0.5}\n[0.5]', "FILE, line 2: must be an object of trial settings, or a list of actions, got [0.5]"),
    (b'"' + b"x" * 100 + b'"', "FILE, line 1: must be an object of trial settings, or a list of actions, got '" + "x" * 39),
    (b'[{"sparsity": 0.5}, {"rate": 1}]', "FILE, line 1, action 2: rate: no such field; the fields are criterion, "),
    (b'{"sparsity": 0.5}', "FILE, line 1: sparsity: no such field; the fields are schedule, "),
    (b'{"target_sparsity": 1.5}', "FILE, line 1: target_sparsity: Input should be less than 1 (got 1.5)"),
    (b'{"target_sparsity": 0.5, "threshold": 1.0}', "FILE, line 1: threshold and target_sparsity contradict each other"),
    (b'\xff{"target_sparsity": 0.5}', "FILE, line 1: must be UTF-8 text, or UTF-16 or 32 with a byte order mark, got byte "),
    (None, "FILE: cannot be read (No such file or directory"),
])
def test_a_bad_file_of_trials_is_one_sentence(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    file = tmp_path / "trials.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(sentence.replace("FILE", f"--trials-from {file}"))) as error:
        read_trials(file)
    assert "\n" not in str(error.value)


def begun(number: int, sparsity: float) -> TrialRecord:
    return TrialRecord(number=number, config=TrialConfig(target_sparsity=sparsity), actions=(), started_at="now")


def test_a_study_goes_on_with_the_list_that_it_began() -> None:
    given = [TrialConfig(target_sparsity=sparsity) for sparsity in (0.1, 0.2, 0.3)]
    for trials in ([], [begun(0, 0.1)], [begun(0, 0.1), begun(1, 0.2), begun(2, 0.3)]):
        check_given(given, trials)
    check_given(given, [begun(0, 0.1), begun(5, 0.3)])  # 0.2 waits; Optuna's numbers have holes where a driver died
    actions = (Action(sparsity=0.5), Action(sparsity=0.7))
    check_given([actions], [begun(0, 0.1).model_copy(update={"config": None, "actions": actions})])


@pytest.mark.parametrize(("trials", "sentence"), [
    ([begun(0, 0.3)], "trial 0 of the study is not among the given trials; give the same list, longer or not, or a new "
                      "directory with --out"),
    ([begun(0, 0.1), begun(3, 0.1)], "trial 3 of the study is not among the given trials"),  # which have it once
    ([begun(0, 0.1), begun(1, 0.2), begun(2, 0.3)], "the study has 3 trials, more than the 2 that are given"),
])
def test_a_list_that_changed_is_refused(trials: list[TrialRecord], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_given([TrialConfig(target_sparsity=0.1), TrialConfig(target_sparsity=0.2)], trials)
