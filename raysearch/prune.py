"""One trial in this process, without Ray: the same rounds, the same ledger."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysearch.config import Action, TrialConfig, study_of
from raysearch.deploy.export import export
from raysearch.evaluation import metric_names
from raysearch.frozen import parse
from raysearch.kernels.device import device_name
from raysearch.models.model import context_limit, load_config
from raysearch.study.ledger import Ledger
from raysearch.study.provenance import provenance, utc_now
from raysearch.study.records import StudyRecord, TrialRecord
from raysearch.study.text import first_line
from raysearch.trial.actions import check_actions, resolve_actions
from raysearch.trial.inputs import read_inputs, resolve
from raysearch.trial.parts import check_parts
from raysearch.trial.round import dense_round, report_round
from raysearch.trial.run import number_of, run_trial
from raysearch.trial.worker import Worker

DEFAULT_CONTEXT_TOKENS = 128
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""What torch, and the code of a model family that is not made for this, may raise; a disk's OSError is none of it."""


def run_prune(study_fields: dict[str, Any], asked: dict[str, Any] | tuple[Action, ...], out: Path,
              echo: Callable[[str], None]) -> Path:
    """Runs the trial in the study directory `out`, scores its last candidate on the report split and exports it. What is
    `asked` are the fields of a TrialConfig, or the actions themselves.

    Returns the exported folder, `out`/model. The same call again finds its rounds in the store.
    """
    limit = context_limit(load_config(str(study_fields["model"])))
    study = resolve(study_of(**{"context_tokens": int(min(limit, DEFAULT_CONTEXT_TOKENS)), **study_fields}), echo)
    config = parse(TrialConfig, asked, "prune") if isinstance(asked, dict) else None
    if config and config.finetune_epochs and study.data.corpus is None:
        raise ValueError(f"finetune_epochs {config.finetune_epochs:g} needs text to train on, got no corpus; give --corpus")
    check_parts([config] if config else tuple(asked), study)
    inputs = read_inputs(study, echo)
    if study.evaluation.tasks:  # nothing is searched, but results and report have to show something
        study = study.replaced(objectives=("num_nonzero", metric_names(inputs.tasks["selection"])[0]))
    actions = resolve_actions(config, study, inputs.num_train_tokens) if config else tuple(asked)
    check_actions(() if config else actions, study, inputs.num_train_tokens, "--actions")
    ledger = Ledger(out)
    record = StudyRecord(study=study, space="prune", space_hash="", root_key=inputs.root_key,
                         provenance=provenance(device_name("cpu")))
    worker = Worker(study, ledger, inputs)
    with ledger.lock():
        is_known = ledger.attach(record)
        try:
            dense_round(worker)
        except FAULTS as error:
            if not is_known:  # the folder held nothing else, and with a mended model it is another study
                ledger.clear()
            raise ValueError(f"model {study.model.path}: cannot be scored ({first_line(error)})") from error
        trial = run_here(worker, config, actions, echo)
        if trial.status == "failed":
            raise ValueError(f"the trial failed in {trial.reason}")
        last = ledger.candidate(trial.keys[-1])
        if study.evaluation.tasks:
            report_round(worker, ledger.candidate(inputs.root_key))
            report_round(worker, last)
        folder = export(ledger, last.key, ledger.directory / "model", echo=echo)
    echo(f"{last.stored_bytes:,} bytes in the smallest format, {last.resident_bytes:,} as plain matrices: {folder}")
    return folder


def run_here(worker: Worker, config: TrialConfig | None, actions: tuple[Action, ...], echo: Callable[[str], None]
             ) -> TrialRecord:
    """The trial of these actions, that of before where there is one, with a line for each round; one that diverged is a failed
    one. ValueError for any other fault."""
    ledger = worker.ledger
    number = number_of(actions, ledger.trials())
    trial = TrialRecord(number=number, config=config, actions=actions, started_at=utc_now())
    try:
        for trial in run_trial(worker, trial):  # noqa: B020  its latest record
            if trial.status == "running":
                done = ledger.candidate(trial.keys[-1])
                quality = ", ".join(f"{name} {metric.value:.4f}" for name, metric in done.metrics.items())
                echo(f"round {len(trial.keys)}/{len(actions)}: sparsity {done.sparsity:.4f}, {done.num_nonzero:,} non-zero of "
                     f"{done.num_parameters:,} {quality}")
    except FAULTS as error:
        raise ValueError(f"the trial failed in {ledger.trial(number).reason} (its traceback is in the record of trial "
                         f"{number}, {ledger.directory / 'trials'})") from error
    return trial
