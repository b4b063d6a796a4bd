"""Search spaces: modules with STUDY and space(trial), random draws from them, and lists of given trials.

Heavy imports are inside, so that a mistyped name is told at once.
"""

import importlib
import importlib.resources
import importlib.util
import json
import keyword
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import raysearch
from raysearch.config import SECTION_OF, Action, Study, TrialConfig, nested
from raysearch.evaluation.names import check_measured
from raysearch.frozen import parse
from raysearch.study.files import new_file, unsealed
from raysearch.study.records import TrialRecord, hash_json
from raysearch.study.storage import location
from raysearch.study.text import json_lines

if TYPE_CHECKING:
    import optuna

    from raysearch.trial.inputs import Inputs

Space = Callable[["optuna.Trial"], dict[str, Any]]
NUM_PROPOSALS = 500
FIRST_FIELDS = ("schedule", "initial_sparsity", "target_sparsity", "num_rounds", "rate", "threshold", "threshold_unit",
                "criterion", "pattern", "scope", "mask_interval_steps", "l1_lambda", "finetune_epochs", "learning_rate")
"""Of a trial's settings, those that every study of this format began with. At their defaults no hash shows the others."""
OBJECTIVES_1 = {"size": "num_nonzero", "objective": "text/bits_per_byte"}
"""Settings of format 1, with their defaults, that are `objectives` now."""
FORMAT_1 = {"eval_items": "num_items", **OBJECTIVES_1}
"""All of its settings that have another name now."""
MAX_SETTLED = 20
"""Distributions of one parameter in those draws; one with more depends on what was drawn before it."""


def load_space(name: str) -> tuple[Study, Space]:
    """`STUDY` and `space` of a search space module, importable by name from here; ValueError of one sentence. The current
    folder comes first for this import alone, also inside a package that is installed under the same name."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        parent, local = name.rpartition(".")[0], os.path.join(here, *name.split(".")[:-1])
        if parent and os.path.isdir(local) and local not in (path := importlib.import_module(parent).__path__):
            path.insert(0, local)
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        is_missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        reason = f"{error}; give a module such as search_spaces.demo, importable from the current folder"
        raise ValueError(f"search space {name}: cannot be imported: {reason if is_missing else in_space(error)}") from error
    finally:
        sys.path.remove(here)
    study, space = getattr(module, "STUDY", None), getattr(module, "space", None)
    if not isinstance(study, dict) or not callable(space):
        raise ValueError(f"search space {name}: must define STUDY (a dict of settings) and space(trial); got "
                         f"{type(study).__name__} and {type(space).__name__}")
    if isinstance(study.get("model"), str) or ({*SECTION_OF, *FORMAT_1} - {*Study.model_fields}) & study.keys():
        raise ValueError(f"search space {name}: its STUDY has no sections, as before format 2; give "
                         f"STUDY = {in_sections(study)}")
    parsed = parse(Study, study, f"{name}.STUDY")
    check_measured(parsed)
    return parsed, space


def in_sections(flat: dict[str, Any]) -> dict[str, Any]:
    """The settings of a STUDY of format 1."""
    today = {FORMAT_1.get(name, name): value for name, value in flat.items() if name not in OBJECTIVES_1}
    if OBJECTIVES_1.keys() & flat:
        today["objectives"] = tuple((OBJECTIVES_1 | flat)[name] for name in OBJECTIVES_1)
    return nested(today)


def new_space(name: str) -> Path:
    """Writes the demo's space as the module of this name, below the current folder; ValueError where there is one."""
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split(".")):
        raise ValueError(f"--new must be the name of a Python module, such as search_spaces.mine, got {name!r}")
    file = Path(*name.split(".")).with_suffix(".py")
    if file.exists():
        raise ValueError(f"--new {name}: {file} exists already; give another name")
    text = (importlib.resources.files("search_spaces") / "demo.py").read_text()
    with new_file(file.absolute()) as aside:
        aside.write_text(text.replace("demo/model", "models/mine"))
    return file


def in_space(error: BaseException) -> str:
    """Where in the user's code the error arose, by what parameter, and what it is."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}, line {error.lineno}: " if error.filename else ""
        return f"{place}{type(error).__name__}: {error.msg}; mend it"
    where, parameter = "", ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if frame.f_globals.get("__name__", "").startswith("optuna."):
            parameter = parameter or f"parameter {frame.f_locals['name']!r}: " * ("name" in frame.f_locals)
        elif not file.startswith(("<frozen", *NOT_THE_USERS)):
            where, parameter = f"{file}, line {line}: ", ""
    return f"{where}{parameter}{type(error).__name__}: {str(error).rstrip('.')}; mend it"


NOT_THE_USERS = (str(Path(raysearch.__file__).parent), *sysconfig.get_paths().values())
"""Folders of raysearch, of Python's library and of what is installed."""


class Proposals:
    """What a space can propose, from seeded random draws: the fingerprint of a study's space, whatever its code."""

    def __init__(self, space: Space) -> None:
        import optuna
        from optuna.distributions import distribution_to_json

        self.distributions: dict[str, set[str]] = {}
        """By parameter: Optuna's JSON of all that it was drawn from."""
        self.configs: list[TrialConfig] = []
        draws: list[object] = []
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(NUM_PROPOSALS):
            trial = study.ask()
            try:
                config = draw(space, trial)
                self.configs.append(config)
                fields: object = {name: value for name, value in config.model_dump(mode="json").items()
                                  if name in FIRST_FIELDS or value != TrialConfig.model_fields[name].default}
            except ValueError:  # a sweep tells it where it happens
                fields = "refused"
            known = {name: distribution_to_json(each) for name, each in sorted(trial.distributions.items())}
            for name, each in known.items():
                self.distributions.setdefault(name, set()).add(each)
            draws.append([known, fields])
        self.hash = hash_json(draws)

    def check(self, distributions: dict[str, str]) -> None:
        """ValueError for a trial whose parameter is drawn from something that the study's space does not have."""
        for name, each in distributions.items():
            known = self.distributions.get(name, set())
            if 0 < len(known) <= MAX_SETTLED and each not in known:
                raise ValueError(f"space(trial) draws {name} from {each}, and the study's space from "
                                 f"{' or '.join(sorted(known))}; a space must always propose the same: undo the change, or "
                                 "give the parameter another name")


def space_hash(space: Space) -> str:
    """Of what the space proposes: its distributions and the fields that it returns, constants from outside it included."""
    return Proposals(space).hash


GIVEN = "given"
"""What stands for the space's hash in a study whose trials are given."""


GivenTrial = TrialConfig | tuple[Action, ...]


def read_trials(file: Path, option: str = "--trials-from") -> list[GivenTrial]:
    """The trials of a file of JSON lines, blank ones left out: an object is a trial's settings, a list is its actions.
    ValueError names the line."""
    trials: list[GivenTrial] = []
    for number, fields in json_lines(file, f"{option} {file}"):
        where = f"{option} {file}, line {number}"
        if isinstance(fields, list) and fields and all(isinstance(action, dict) for action in fields):
            trials.append(tuple(parse(Action, action, f"{where}, action {index}") for index, action in enumerate(fields, 1)))
        elif isinstance(fields, dict):
            trials.append(parse(TrialConfig, fields, where))
        else:
            raise ValueError(f"{where}: must be an object of trial settings, or a list of actions, got {fields!r:.40}")
    if not trials:
        raise ValueError(f"{option} {file}: holds no trial; give one object of trial settings in each line")
    return trials


def read_actions(file: str, option: str = "--actions") -> tuple[Action, ...]:
    """Those of a trial's record, or of a file with one JSON list of them; ValueError names the file."""
    try:
        content = json.loads(unsealed(location(file).read_bytes()))
    except ValueError as error:
        raise ValueError(f"{option} {file}: is no JSON, or damaged ({error}); give a trial's record or a list of actions"
                         ) from error
    actions = content.get("actions") if isinstance(content, dict) else content
    if not isinstance(actions, list) or not actions or not all(isinstance(action, dict) for action in actions):
        raise ValueError(f"{option} {file}: must be a trial's record (DIR/trials/NUMBER.json), or a JSON list of actions")
    return tuple(parse(Action, action, f"{option} {file}, action {index}") for index, action in enumerate(actions, 1))


def given_as(trial: TrialRecord) -> GivenTrial:
    return trial.actions if trial.config is None else trial.config


def check_given(given: Sequence[GivenTrial], trials: Sequence[TrialRecord]) -> None:
    """ValueError unless each of the study's trials, but for those of `raysearch finish`, is one of the given ones."""
    trials = [trial for trial in trials if not trial.is_finish]
    if len(trials) > len(given):
        raise ValueError(f"the study has {len(trials)} trials, more than the {len(given)} that are given; give the same list, "
                         "longer or not, or a new directory with --out")
    left = list(given)
    for trial in trials:
        if given_as(trial) not in left:
            raise ValueError(f"trial {trial.number} of the study is not among the given trials; give the same list, longer or "
                             "not, or a new directory with --out")
        left.remove(given_as(trial))


def sample_trials(study: Study, space: Space, inputs: "Inputs", num_trials: int) -> list[tuple[Action, ...]]:
    """Random draws from the space, resolved; ValueError of one sentence for a draw that contradicts itself."""
    import optuna

    from raysearch.trial.actions import resolve_actions

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dry = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [resolve_actions(draw(space, dry.ask()), study, inputs.num_train_tokens) for _ in range(num_trials)]


def draw(space: Space, trial: "optuna.Trial") -> TrialConfig:
    """The configuration that `space` makes of one Optuna trial."""
    try:
        fields = space(trial)
    except Exception as error:
        raise ValueError(f"space(trial): {in_space(error)}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"space(trial) must return a dict of trial settings, got {type(fields).__name__}")
    return parse(TrialConfig, fields, "space(trial)")
