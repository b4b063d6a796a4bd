"""The commands. Thin: each parses its options, calls one function and prints; imports are inside, so help is instant.

A mistake of the user ends in one sentence on stderr and exit code 2; RAYSEARCH_TRACEBACK=1 shows where it was found.
"""

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Search over pruning schedules for GPT language models.")

Out = Annotated[Path, typer.Option(help="Directory to write to.")]
StudyDir = Annotated[Path, typer.Argument(help="Directory of a study.", metavar="DIR")]


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        app()
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last finished round", code=130)
    except (ValueError, OSError) as error:
        if os.environ.get("RAYSEARCH_TRACEBACK"):
            raise
        text = f"{error.filename or 'a file'}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
        fail(" ".join(str(text).split()))


def fail(sentence: str, code: int = 2) -> None:
    print(f"raysearch: {sentence}", file=sys.stderr)
    sys.exit(code)


def echo(line: str) -> None:
    print(line, flush=True)


@app.command()
def demo(out: Out = Path("demo")) -> None:
    """Everything in minutes: train a tiny GPT, search, draw the frontier, pick, export."""
    from raysearch.demo import run_demo

    run_demo(out, echo)


@app.command()
def pretrain(
    preset: Annotated[str, typer.Option(help="tiny, books-30m, gpt2-small or gpt-efficio-950m.")] = "tiny",
    corpus: Annotated[str, typer.Option(help='"builtin", files, or a Hugging Face dataset.')] = "builtin",
    out: Out = Path("model"),
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; the preset's number by default.")] = None,
    num_workers: Annotated[int, typer.Option(help="Ranks.")] = 1,
    zero_stage: Annotated[int, typer.Option(min=0, max=3)] = 0,
) -> None:
    """Train a dense GPT with Ray Train and DeepSpeed; the same command resumes."""
    from raysearch.pretrain import pretrain as run

    run(preset, corpus, out, steps=steps, num_workers=num_workers, zero_stage=zero_stage)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face causal LM.")],
    out: Out,
    criterion: str = "magnitude",
    pattern: str = "unstructured",
    scope: Annotated[str, typer.Option(help="global, layer or row.")] = "global",
    sparsity: Annotated[float | None, typer.Option(help="Target among the prunable weights.")] = None,
    initial_sparsity: float = 0.0,
    schedule: Annotated[str, typer.Option(help="one_shot, constant, linear, exponential, cubic or cosine.")] = "one_shot",
    rounds: Annotated[int | None, typer.Option(help="Number of rounds.")] = None,
    rate: Annotated[float | None, typer.Option(help="Fraction of the remaining weights per round.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Magnitude below which weights are pruned.")] = None,
    threshold_unit: Annotated[str, typer.Option(help="absolute or std.")] = "absolute",
    l1_lambda: float = 0.0,
    finetune_epochs: float = 0.0,
    learning_rate: float = 3e-4,
    prunable: Annotated[str, typer.Option(help="matrices, or all to add the embeddings.")] = "matrices",
    corpus: Annotated[str | None, typer.Option(help="Text to fine-tune and evaluate on.")] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated; from the corpus or --data-dir.")] = "",
    data_dir: str | None = None,
    eval_items: int | None = None,
    context_tokens: int = 128,
    batch_tokens: int = 2048,
    zero_stage: int = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto for the checkpoint's own.")] = "auto",
    seed: int = 0,
) -> None:
    """Run one trial in this process, without Ray, and export its last candidate to OUT/model."""
    from raysearch.prune import run_prune

    config = {"criterion": criterion, "pattern": pattern, "scope": scope, "target_sparsity": sparsity,
              "initial_sparsity": initial_sparsity, "schedule": schedule, "num_rounds": rounds, "rate": rate,
              "threshold": threshold, "threshold_unit": threshold_unit, "l1_lambda": l1_lambda,
              "finetune_epochs": finetune_epochs, "learning_rate": learning_rate}
    names = tuple(tasks.split(",")) if tasks else (("text", "last_word", "choice") if corpus else ())
    study = {"model": model, "prunable": prunable, "corpus": corpus, "tasks": names, "data_dir": data_dir,
             "eval_items": eval_items, "context_tokens": context_tokens, "batch_tokens": batch_tokens,
             "zero_stage": zero_stage, "dtype": dtype, "seed": seed}
    run_prune(study, config, out, echo)


@app.command()
def sweep(
    space: Annotated[str, typer.Argument(help="Search space module, such as search_spaces.demo.")],
    out: Annotated[Path | None, typer.Option(help="Study directory; studies/NAME by default.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in total; a larger number extends.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at the same time.")] = None,
    time_budget: Annotated[str | None, typer.Option(help="Start no trial after this long: 90s, 10m, 2h.")] = None,
) -> None:
    """Search: Ray Tune runs trials that Optuna proposes. The same command resumes or extends."""
    from raysearch.search import load_space
    from raysearch.search import sweep as run

    study, sample = load_space(space)
    changes = {"num_trials": trials, "max_concurrent": max_concurrent,
               "time_budget_s": parse_seconds(time_budget) if time_budget else None}
    study = study.model_copy(update={name: value for name, value in changes.items() if value is not None})
    result = run(space, out or Path("studies") / space.rpartition(".")[2], study, sample, echo)
    echo(f"{result.num_candidates} candidates of {result.num_trials} trials ({result.num_failed} failed) in "
         f"{result.seconds:.0f} s: {result.directory}")
    if result.interrupted:
        raise KeyboardInterrupt


@app.command()
def results(
    directory: StudyDir,
    format: Annotated[str, typer.Option(help="table, json or csv.")] = "table",
    frontier: Annotated[bool, typer.Option("--frontier", help="Only the Pareto frontier.")] = False,
) -> None:
    """One row per candidate."""
    from analysis.load import load
    from analysis.tables import results_table

    print(results_table(load(directory), format, frontier), end="")


@app.command()
def report(directory: StudyDir, out: Annotated[Path | None, typer.Option(help="File to write.")] = None) -> None:
    """Write one self-contained report.html."""
    from analysis.report import write_report

    echo(str(write_report(directory, out)))


@app.command()
def pick(
    directory: StudyDir,
    max_bytes: Annotated[str | None, typer.Option(help="Stored bytes: 300MB, 1.2GB.")] = None,
    max_nonzero: Annotated[str | None, typer.Option(help="Non-zero parameters: 24M.")] = None,
    max_drop: Annotated[list[str] | None, typer.Option(help="METRIC=POINTS lost at most against dense.")] = None,
    min: Annotated[list[str] | None, typer.Option(help="METRIC=VALUE at least.")] = None,
    max: Annotated[list[str] | None, typer.Option(help="METRIC=VALUE at most.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; DIR/pick.json by default.")] = None,
) -> None:
    """Choose the smallest candidate that satisfies every constraint, on the report split."""
    from analysis.load import load
    from analysis.pick import describe_pick, parse_constraints, write_pick
    from analysis.pick import pick as choose

    constraints = parse_constraints(max_bytes, max_nonzero, max_drop or (), min or (), max or ())
    picked = choose(load(directory), constraints)
    path = write_pick(picked, out or directory / "pick.json")
    echo(describe_pick(picked) + f"\n{path}")


@app.command()
def export(
    pick_file: Annotated[Path, typer.Argument(help="pick.json of `raysearch pick`.", metavar="PICK")],
    out: Out,
    format: Annotated[str, typer.Option(help="dense (transformers loads it) or compressed (smaller).")] = "dense",
) -> None:
    """Write the picked candidate as a deployment folder."""
    from analysis.pick import read_pick
    from raysearch.export import export as run
    from raysearch.ledger import Ledger

    picked = read_pick(pick_file)
    echo(str(run(Ledger.open(picked.study_directory), picked.key, out, format)))


def parse_seconds(text: str) -> float:
    """ "90s", "10m", "2h" or a number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--time-budget must be a positive time such as 90s, 10m or 2h, got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
