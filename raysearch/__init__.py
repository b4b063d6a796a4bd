"""raysearch: distributed search over pruning schedules for GPT language models.

What a script needs, beside `analysis`: `sweep` a study, or run one trial of it (`run_trial`), `export` what was picked, `load`
it. Each imports what it needs when it is called.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def set_environment() -> None:
    """What the libraries read when they are imported, here and in Ray's processes; what is set already stays."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # or tokenizers warns in every process that forks after it
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray hides no GPU from an actor that asks for none
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of one trial starve the others
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's boxes and tables, which no log can use
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no GPU


def sweep(study: Mapping[str, Any], space: Callable[[Any], dict[str, Any]], out: str | Path,
          echo: Callable[[str], None] = print, **options: Any) -> Any:
    """Runs, resumes or extends the study in the directory or URI `out`, as `raysearch sweep` does with a module's STUDY
    and space(trial). `options` are those of raysearch.search.sweep.sweep (keep, enqueued, warm_starts, max_disk_bytes, ...).
    Returns its SweepResult; ValueError of one sentence for bad input."""
    set_environment()
    from raysearch.config import Study
    from raysearch.frozen import parse
    from raysearch.search.sweep import sweep as run

    name = f"{space.__module__}.{getattr(space, '__name__', 'space')}"
    return run(name, str(out), parse(Study, dict(study), "study"), space, echo, **options)


def run_trial(study: Mapping[str, Any], settings: Mapping[str, Any], out: str | Path,
              echo: Callable[[str], None] = print) -> Path:
    """Runs one trial with these settings in this process, without Ray, as `raysearch prune` does; the study directory is `out`.
    Returns the folder of the exported model."""
    set_environment()
    from raysearch.config import Study
    from raysearch.frozen import parse
    from raysearch.prune import run_prune

    parse(Study, dict(study), "study")
    fields = {name: value for section in study.values() for name, value in section.items()}
    return run_prune({"model": fields.pop("path"), **fields}, dict(settings), Path(out), echo)


def export(pick: Any, out: str | Path, format: str = "hf", echo: Callable[[str], None] = print) -> Path:
    """Writes what `analysis.pick.pick` chose as a deployment folder: "hf", which transformers loads, "sparse",
    or "compact": what is left when dead layers, heads and neurons are cut out.
    Weights that were deleted or damaged are computed again."""
    set_environment()
    from raysearch.deploy.export import export as run
    from raysearch.study.ledger import Ledger
    from raysearch.trial.round import recover_weights

    ledger = Ledger.open(pick.study_directory)
    recover_weights(ledger, pick.key, echo)
    return run(ledger, pick.key, Path(out), format, echo)


def load(folder: Any, backend: str = "sparse") -> Any:
    """The model of a folder that `raysearch export` wrote, of any format: a transformers model on the CPU. A
    sparse one runs from its kept weights on sparse kernels; with backend="dense" it is made dense."""
    from raysearch.deploy.load import load as load_export

    return load_export(folder, backend)
