"""Search spaces: modules with STUDY and space(trial), random draws from them, and lists of given trials.

Heavy imports are inside, so that a mistyped name is told at once.
"""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysearch.config import Action, Study, TrialConfig, is_flat, nested, parse
from raysearch.study.records import FORMAT, TrialRecord, hash_json

if TYPE_CHECKING:
    import optuna

    from raysearch.trial.inputs import Inputs

Space = Callable[["optuna.Trial"], dict[str, Any]]
NUM_PROPOSALS = 500
LATER_FIELDS = ("budget", "calibration_sequences", "distill_alpha", "mask_decay", "temperature")
"""Of a trial's settings, those that studies of this format may have begun without: at their defaults no hash shows them."""
MAX_SETTLED = 20
"""Distributions of one parameter in those draws; one with more depends on what was drawn before it."""


def load_space(name: str) -> tuple[Study, Space]:
    """`STUDY` and `space` of a search space module, importable by name from here; ValueError of one sentence."""
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"search space {name}: cannot be imported ({error}); give a module such as "
                         "search_spaces.demo, importable from the current folder") from error
    finally:
        sys.path.remove(os.getcwd())
    study, space = getattr(module, "STUDY", None), getattr(module, "space", None)
    if not isinstance(study, dict) or not callable(space):
        raise ValueError(f"search space {name}: must define STUDY (a dict of settings) and space(trial); got "
                         f"{type(study).__name__} and {type(space).__name__}")
    if is_flat(study):
        raise ValueError(f"search space {name}: its STUDY has no sections, as before format {FORMAT}; give "
                         f"STUDY = {nested(study)}")
    return parse(Study, study, f"{name}.STUDY"), space


class Proposals:
    """What a space can propose, from seeded random draws: the fingerprint of a study's space, whatever its code."""

    def __init__(self, space: Space) -> None:
        import optuna
        from optuna.distributions import distribution_to_json

        self.distributions: dict[str, set[str]] = {}
        """By parameter: Optuna's JSON of all that it was drawn from."""
        draws: list[object] = []
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(NUM_PROPOSALS):
            trial = study.ask()
            try:
                config = draw(space, trial)
                fields: object = {name: value for name, value in config.model_dump(mode="json").items()
                                  if name not in LATER_FIELDS or value != TrialConfig.model_fields[name].default}
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


def read_trials(file: Path) -> list[GivenTrial]:
    """The trials of a file of JSON lines, blank ones left out: an object is a trial's settings, a list is its actions.
    ValueError names the line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--trials-from {file}: cannot be read ({error}); give a file of JSON lines, each the settings of one "
                         "trial") from error
    trials: list[GivenTrial] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"--trials-from {file}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: is not JSON ({error}); give one object of trial settings in each line") from error
        if isinstance(fields, list) and fields and all(isinstance(action, dict) for action in fields):
            trials.append(tuple(parse(Action, action, f"{where}, action {index}") for index, action in enumerate(fields, 1)))
        elif isinstance(fields, dict):
            trials.append(parse(TrialConfig, fields, where))
        else:
            raise ValueError(f"{where}: must be an object of trial settings, or a list of actions, got {line.strip()[:40]}")
    if not trials:
        raise ValueError(f"--trials-from {file}: holds no trial; give one object of trial settings in each line")
    return trials


def check_given(given: Sequence[GivenTrial], trials: Sequence[TrialRecord]) -> None:
    """ValueError unless the study's trials are the first of the given ones, and none is missing."""
    if len(trials) > len(given):
        raise ValueError(f"the study has {len(trials)} trials, more than the {len(given)} that are given; give the same list, "
                         "longer or not, or a new directory with --out")
    for position, (one, trial) in enumerate(zip(given, trials), start=1):
        if one != (trial.actions if trial.config is None else trial.config):
            raise ValueError(f"trial {trial.number} of the study is not number {position} of the given trials; give the same "
                             "list, longer or not, or a new directory with --out")


def sample_trials(study: Study, space: Space, inputs: "Inputs", num_trials: int) -> list[tuple[Action, ...]]:
    """Random draws from the space, resolved; ValueError of one sentence for a draw that contradicts itself."""
    import optuna

    from raysearch.trial.actions import resolve_actions

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dry = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [resolve_actions(draw(space, dry.ask()), study, inputs.num_train_tokens) for _ in range(num_trials)]


def draw(space: Space, trial: "optuna.Trial") -> TrialConfig:
    """The configuration that `space` makes of one Optuna trial."""
    fields = space(trial)
    if not isinstance(fields, dict):
        raise ValueError(f"space(trial) must return a dict of trial settings, got {type(fields).__name__}")
    return parse(TrialConfig, fields, "space(trial)")
