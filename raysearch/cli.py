"""The commands that make and measure; those on a finished study are in decide.py.

Thin: each parses its options, calls one function and prints; imports are inside, so help is instant. A mistake of the user ends
in one sentence on stderr and exit code 2; RAYSEARCH_TRACEBACK=1 shows where it was found.
"""

import os
import shlex
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

import raysearch
from raysearch import decide, terminal
from raysearch.cluster.ending import end_within, stopping_on_signals
from raysearch.terminal import (
    Out,
    StudyOut,
    TextField,
    app,
    check_file,
    check_study,
    comma_separated,
    default_directory,
    doing,
    echo,
    fail,
)
from raysearch.units import parse_bytes, parse_seconds

__all__ = ["app", "decide", "main"]


def main() -> None:
    raysearch.set_environment()
    ended = threading.Event()
    threading.Thread(target=terminal.keep_talking, args=(ended,), daemon=True).start()
    try:
        with stopping_on_signals():
            app()
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last finished round", code=130)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("training failed"):
            raise
        if os.environ.get("RAYSEARCH_TRACEBACK"):
            raise
        fail(" ".join(terminal.sentence(error).split()))
    finally:
        ended.set()
        terminal.now.clear()


@app.command()
def demo(out: Out = Path("demo")) -> None:
    """Everything in minutes: train a tiny GPT, search, draw the frontier, pick, export."""
    doing("at the demo")
    from raysearch.demo import run_demo

    run_demo(out, echo)


@app.command()
def pretrain(
    preset: Annotated[str, typer.Option(help="tiny, books-30m, gpt2-small or gpt-efficio-950m.")] = "tiny",
    corpus: Annotated[str, typer.Option(help='"builtin", files, or a Hugging Face dataset.')] = "builtin",
    text_field: TextField = "text",
    out: Out = Path("model"),
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; the preset's number by default.")] = None,
    num_workers: Annotated[int, typer.Option(help="Ranks.")] = 1,
    zero_stage: Annotated[int, typer.Option(min=0, max=3)] = 0,
) -> None:
    """Train a dense GPT with Ray Train and DeepSpeed; the same command resumes."""
    from raysearch.training.corpus import check_corpus
    from raysearch.training.presets import PRESETS

    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    check_corpus(corpus, text_field)
    doing("training")
    from raysearch.training.pretrain import pretrain as run

    run(preset, corpus, out, text_field=text_field, steps=steps, num_workers=num_workers, zero_stage=zero_stage, echo=echo)


@app.command()
def prune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face causal LM.")],
    out: Out,
    criterion: str = "magnitude",
    pattern: Annotated[str, typer.Option(help="unstructured, head, neuron, layer, block, block64, hybrid, or N:M (2:4)."
                                          )] = "unstructured",
    scope: Annotated[str, typer.Option(help="global, layer or row.")] = "global",
    uniform: Annotated[bool, typer.Option("--uniform", help="As many heads or neurons in every layer.")] = False,
    budget: Annotated[str, typer.Option(help="Under scope layer or row: uniform, erdos_renyi or owl.")] = "uniform",
    owl_lambda: Annotated[float, typer.Option(help="How far a block's density may be from the mean, with owl.")] = 0.08,
    owl_m: Annotated[float, typer.Option(help="A score is an outlier above this many times the mean, with owl.")] = 5.0,
    mask_interval_steps: Annotated[int, typer.Option(help="Between two masks of a criterion that prunes in the round.")] = 10,
    mask_decay: Annotated[float, typer.Option(help="Of what criterion sr_ste has masked.")] = 2e-4,
    score_rate: Annotated[float, typer.Option(help="Learning rate of soft_movement's scores.")] = 1e-2,
    score_penalty: Annotated[float, typer.Option(help="On the mean of their sigmoid, in nats per token.")] = 400.0,
    gate_penalty: Annotated[float, typer.Option(help="On the mean probability that a gate of l0 is open, in nats.")] = 1.0,
    drop_fraction: Annotated[float, typer.Option(help="Of a layer, that rigl and set drop for others at a time.")] = 0.3,
    calibration_sequences: Annotated[int, typer.Option(help="Of training text, for a method that looks at inputs.")] = 128,
    target_sparsity: Annotated[float | None, typer.Option("--sparsity", help="Target among the prunable weights.")] = None,
    initial_sparsity: float = 0.0,
    schedule: Annotated[str, typer.Option(help="one_shot, constant, linear, exponential, cubic or cosine.")] = "one_shot",
    num_rounds: Annotated[int | None, typer.Option("--rounds", help="Number of rounds.")] = None,
    rate: Annotated[float | None, typer.Option(help="Fraction of the remaining weights per round.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Magnitude below which weights are pruned.")] = None,
    threshold_unit: Annotated[str, typer.Option(help="absolute or std.")] = "absolute",
    l1_lambda: float = 0.0,
    layer_drop: Annotated[float, typer.Option(help="Chance that a layer is left out of a step of fine-tuning.")] = 0.0,
    trainable: Annotated[str, typer.Option(help="all, or vectors: biases and norms alone.")] = "all",
    group_lambda: Annotated[float, typer.Option(help="Of group lasso, on whole heads, neurons or layers.")] = 0.0,
    distill_alpha: Annotated[float, typer.Option(help="Share of the dense model's logits in the loss.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 1.0,
    distill_hidden: Annotated[float, typer.Option(help="Weight of the distance from its hidden states (SquareHead).")] = 0.0,
    finetune_epochs: float = 0.0,
    learning_rate: float = 3e-4,
    lr_schedule: Annotated[str, typer.Option(help="Within a round: cosine, constant or one_cycle.")] = "cosine",
    actions: Annotated[str | None, typer.Option(help="Instead of all of these the rounds themselves: a trial's record in a "
                                                     "study, or a JSON list.", metavar="FILE")] = None,
    prunable: Annotated[str, typer.Option(help="matrices, or all to add the embeddings.")] = "matrices",
    corpus: Annotated[str | None, typer.Option(help="Text to fine-tune and evaluate on.")] = None,
    text_field: TextField = "text",
    tasks: Annotated[str, typer.Option(help="Comma-separated; from the corpus or --data-dir.")] = "",
    data_dir: str | None = None,
    num_items: Annotated[int | None, typer.Option("--eval-items", help="Items of each task and split.")] = None,
    num_report_items: Annotated[int | None, typer.Option("--report-items", help="Of the report split, if not as many.")] = None,
    context_tokens: Annotated[int | None, typer.Option(help="128, or the model's own where that is less.")] = None,
    epoch_tokens: Annotated[int | None, typer.Option(help="Tokens of one epoch; without it all.")] = None,
    batch_tokens: int = 2048,
    weight_decay: float = 0.0,
    warmup_fraction: Annotated[float, typer.Option(help="Of a round's steps, in which the learning rate rises.")] = 0.1,
    zero_stage: int = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto for the checkpoint's own.")] = "auto",
    seed: int = 0,
) -> None:
    """Run one trial in this process, without Ray, and export its last candidate to OUT/model."""
    from raysearch.config import TrialConfig, study_of
    from raysearch.frozen import parse

    # options have the names of the settings' fields, so each stands above once; `parse` refuses one that is no field
    default = ("text", "last_word", "choice") if corpus else ()
    given = context.params | {"tasks": comma_separated(tasks, "--tasks") if tasks else default}
    del given["out"], given["actions"]
    if not context_tokens:  # run_prune has a default that the model's limit bounds
        del given["context_tokens"]
    config = {name: given.pop(name) for name in TrialConfig.model_fields if name in given}
    check_study(study_of(**given))
    trial = parse(TrialConfig, config, "prune")
    if actions and (changed := [name for name, field in TrialConfig.model_fields.items() if config[name] != field.default]):
        raise ValueError(f"--actions {actions} says all of every round, so the settings {', '.join(changed)} contradict it; "
                         "leave them out")
    from raysearch.search.space import read_actions
    from raysearch.trial.actions import check_names  # torch alone: 1 s

    asked = read_actions(actions) if actions else None
    for each in asked or (trial,):
        check_names(each)
    from raysearch.prune import run_prune

    run_prune(given, asked or config, out, echo)


@app.command()
def sweep(
    space: Annotated[str, typer.Argument(help="Search space module, such as search_spaces.demo.")],
    out: StudyOut = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in total; a larger number extends.")] = None,
    trials_from: Annotated[Path | None, typer.Option(help="Run these trials, JSON lines of settings, instead of sampling.",
                                                     metavar="FILE")] = None,
    enqueue: Annotated[Path | None, typer.Option(help="Run these trials first, then those that are sampled.",
                                                 metavar="FILE")] = None,
    warm_start: Annotated[list[str] | None, typer.Option(help="Study of the same model to learn from; may be given again.",
                                                         metavar="DIR")] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at the same time.")] = None,
    time_budget: Annotated[str | None, typer.Option(help="Start no trial after this long: 90s, 10m, 2h.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="Start no trial once rounds took so much.")] = None,
    min_gain_per_gpu_hour: Annotated[float | None, typer.Option(
        help="Start no trial once none is expected to add such a share of hypervolume, 0.01 for 1 %.")] = None,
    keep: Annotated[str, typer.Option(help="Whose weights stay at the end: frontier, all or none.")] = "all",
    max_disk: Annotated[str | None, typer.Option(help="Delete weights above this, such as 20GB; the frontier's last.")] = None,
    autoscaling: Annotated[bool, typer.Option("--autoscaling", help="Wait for nodes that the cluster adds.")] = False,
    mlflow: Annotated[str | None, typer.Option(help="Tracking URI to log to as well.", metavar="URI")] = None,
    wandb: Annotated[str | None, typer.Option(help="W&B project to log to as well.", metavar="PROJECT")] = None,
) -> None:
    """Search: Ray Tune runs trials that Optuna proposes. The same command resumes or extends."""
    doing("at the sweep")
    from raysearch.search.space import load_space, read_trials

    if keep not in ("frontier", "all", "none"):
        raise ValueError(f"--keep must be frontier, all or none, got {keep!r}")
    if trials is not None and trials_from is not None:
        raise ValueError(f"--trials {trials} and --trials-from {trials_from} contradict each other: the file says how many; "
                         "give one of them")
    if trials_from is not None and (enqueue is not None or warm_start):
        raise ValueError(f"--trials-from {trials_from} runs its trials and no others, so --enqueue and --warm-start contradict "
                         "it; leave them out")
    given = read_trials(trials_from) if trials_from else None
    enqueued = read_trials(enqueue, "--enqueue") if enqueue else []
    max_disk_bytes = parse_bytes(max_disk) if max_disk else None
    study, sample = load_space(space)
    changes = {"num_trials": trials, "max_concurrent": max_concurrent, "gpu_hours": gpu_hours,
               "min_gain_per_gpu_hour": min_gain_per_gpu_hour,
               "time_budget_s": parse_seconds(time_budget) if time_budget else None}
    study = study.replaced(**{name: value for name, value in changes.items() if value is not None})
    from raysearch.study.storage import location

    directory = location(out or default_directory(space))
    check_study(study)
    from raysearch.search.sweep import GivenUp  # after what may be mistyped, for this takes seconds
    from raysearch.search.sweep import sweep as run

    try:
        result = run(space, directory, study, sample, echo, given=given, enqueued=enqueued, warm_starts=warm_start or (),
                     keep=keep, max_disk_bytes=max_disk_bytes, autoscaling=autoscaling, mlflow_uri=mlflow, wandb_project=wandb)
    except GivenUp:
        end_within(10.0, code=2)  # Ray's own end waits for actors that no node can run
        raise
    echo(f"{result.num_candidates} candidates of {result.num_trials} trials ({result.num_failed} failed) in "
         f"{result.seconds:.0f} s: {result.directory}")
    if result.interrupted:
        raise KeyboardInterrupt
    if result.num_failed == result.num_trials > 0:
        fail(f"every trial failed; the reasons: raysearch status {shlex.quote(str(result.directory))}", code=1)


@app.command()
def space(
    space: Annotated[str | None, typer.Argument(help="Search space module, such as search_spaces.demo.")] = None,
    new: Annotated[str | None, typer.Option(help="Write this module instead, a copy of the demo's.", metavar="NAME")] = None,
) -> None:
    """What a search space draws: its parameters, when each occurs, and ten configurations round by round."""
    from raysearch.search.space import load_space, new_space

    if (space is None) == (new is None):
        raise ValueError("space takes a module to show, or --new NAME to write one, got "
                         f"{'neither' if new is None else f'{space} and --new {new}'}; give one of them")
    if new is not None:
        echo(f"{new_space(new)}: change STUDY and space(trial) there, then: raysearch space {shlex.quote(new)}")
        return
    study, sample = load_space(str(space))
    from raysearch.search.draws import describe_space, draws

    drawn = draws(study, sample)
    weights = None
    if os.path.isdir(study.model.path):
        from raysearch.models.model import num_weights  # seconds, after what may be wrong in the space

        weights = num_weights(study.model.path, study.model.prunable)
    echo(describe_space(study, drawn, weights))
    if weights is None:
        echo(f"model {study.model.path}: no such folder here, so that sizes are fractions")


@app.command()
def plan(
    space: Annotated[str, typer.Argument(help="Search space module, such as search_spaces.demo.")],
    out: StudyOut = None,
) -> None:
    """What a sweep would cost and write, from one short measured round; nothing is written to OUT."""
    from raysearch.search.space import load_space

    check_study(load_space(space)[0])
    from raysearch.plan import describe_plan, make_plan

    doing("measuring")
    echo("measuring one short round on this machine ...")
    echo(describe_plan(make_plan(space, out or default_directory(space), echo)))


@app.command()
def doctor(
    directory: Annotated[str, typer.Argument(help="Where studies will be written.", metavar="[DIR]")] = ".",
) -> None:
    """What is missing or unsafe on this machine and its Ray cluster; exit code 1 when something will not work."""
    from raysearch.cluster.doctor import examine

    checks = examine(directory)
    for check in checks:
        echo(f"{check.level:<8} {check.text}")
    if any(check.level == "problem" for check in checks):
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model or deployment folder.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated; `raysearch tasks` lists them.")],
    data_dir: Annotated[Path | None, typer.Option(help="Local files; the hub without it.")] = None,
    corpus: Annotated[str, typer.Option(help="For the tasks text, last_word and choice.")] = "builtin",
    text_field: TextField = "text",
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0)] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    backend: Annotated[str, typer.Option(help="auto: sparse kernels where they are faster; or dense.")] = "auto",
    samples: Annotated[Path | None, typer.Option(help="Write per-item results here, as JSON lines.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Score a model on named tasks, with lm-eval's metrics."""
    from raysearch.evaluation.names import check_names

    check_names(model, comma_separated(tasks, "--tasks"), corpus, text_field)
    if backend not in ("auto", "dense"):
        raise ValueError(f"--backend must be auto or dense, got {backend!r}")
    if not json:
        doing("scoring")
    from json import dumps

    from analysis.tables import aligned, with_stderr
    from raysearch.evaluate import evaluate_model

    check_file(samples, "--samples")
    scored = evaluate_model(model, comma_separated(tasks, "--tasks"), data_dir=data_dir, corpus=corpus, text_field=text_field,
                            limit=limit, num_fewshot=num_fewshot, batch_tokens=batch_tokens, backend=backend, samples=samples,
                            progress=sys.stderr.isatty(), say=lambda line: print(line, file=sys.stderr, flush=True))
    if json:
        echo(dumps(scored))
        return
    rows = [[task, name, with_stderr(value, row[f"{name}_stderr"] or float("nan")), str(row["num_items"])]
            for task, row in scored["results"].items() for name, value in row.items()
            if name != "num_items" and not name.endswith("_stderr")]
    echo(aligned(["task", "metric", "value", "items"], rows, left=["task", "metric"]).rstrip())
    if scored["num_truncated"]:
        echo(f"{scored['num_truncated']} requests were longer than the context and were cut on the left")


@app.command()
def kernels(
    model: Annotated[str, typer.Argument(help="Model or deployment folder.")],
    tokens: Annotated[str, typer.Option(help="Tokens per forward, comma-separated.")] = "1,4096",
) -> None:
    """Which sparse kernel each layer runs on, how much faster than dense, and what the whole model gains."""
    from raysearch.models.checkpoint import model_folder

    model_folder(model)
    doing("timing kernels")
    from analysis.tables import aligned
    from raysearch.deploy.load import open_model
    from raysearch.models.sparse import sparsify_for_inference

    counts = comma_separated(tokens, "--tokens")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise ValueError(f"--tokens must be whole numbers of 1 or more, comma-separated, got {tokens!r}")
    result = sparsify_for_inference(open_model(model), num_tokens=list(map(int, counts)), say=echo)
    header = ["layer", "shape", "pattern", "sparsity", "tokens", "backend", "dense us", "sparse us", "ratio", "share of time"]
    dense_us = {count: sum(layer.choices[count].dense_us or 0 for layer in result.layers) for count in result.model_ratio}
    rows = [[layer.name, f"{layer.shape[0]}x{layer.shape[1]}", layer.pattern, f"{layer.sparsity:.3f}", str(count),
             f"{choice.backend} {choice.variant}" if choice.variant else choice.backend, f"{choice.dense_us:.1f}",
             "" if choice.sparse_us is None else f"{choice.sparse_us:.1f}", f"{choice.ratio:.2f}",
             f"{(choice.dense_us or 0) / dense_us[count]:.1%}"]
            for layer in result.layers for count, choice in sorted(layer.choices.items())]
    cut = result.compaction
    echo(f"compaction: {cut.num_units} MLP units, {cut.num_heads} heads and {cut.num_layers} blocks were dead, "
         f"{cut.num_parameters:,} parameters")
    echo(aligned(header, rows, left=["layer", "pattern", "backend"]).rstrip() if rows else "no layer is sparse enough to try")
    for count, ratio in result.model_ratio.items():
        echo(f"whole forward, {count} tokens: " + (f"{ratio:.2f} times dense" if ratio > 1 else "stays dense"))
    echo(f"tuning took {result.tuning_s:.1f} s; decisions are kept")


@app.command()
def bench_kernels(
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    cases: Annotated[str, typer.Option(help="must, grid or cpu.")] = "must",
) -> None:
    """Time every sparse kernel against dense, and against torch's own, on this machine."""
    from json import dumps

    import torch

    from raysearch.kernels import benchmark

    groups = {"must": benchmark.MUST, "grid": benchmark.GRID, "cpu": benchmark.CPU}
    check_file(out, "--out")
    if cases not in groups:
        raise ValueError(f"--cases must be one of {', '.join(groups)}, got {cases!r}")
    if cases != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--cases {cases} needs a CUDA GPU, and torch sees none here; --cases cpu needs none")
    device = torch.device("cpu" if cases == "cpu" else "cuda")
    timings = benchmark.header(device) | {"records": benchmark.run_grid(groups[cases], device, echo)}
    out.write_text(dumps(timings, indent=1))


@app.command()
def tasks() -> None:
    """The tasks, with everything that is pinned: prompt, target, shots, metrics, normalisation."""
    from raysearch.evaluation import describe_tasks

    for row in describe_tasks():
        echo("\n".join(f"{name + ':':<15}{value}" for name, value in row.items()) + "\n")
