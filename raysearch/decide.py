"""The commands on a study: how it goes, what it found, which candidate to ship, and the folder that ships."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

import raysearch
from raysearch.terminal import Out, StudyDir, app, doing, echo, warn_of


@app.command()
def status(directory: StudyDir, json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """How a study is doing, from any machine that sees its directory."""
    from raysearch.status import describe_status, study_status

    current = study_status(directory)
    warn_of(current.damage)
    print(current.model_dump_json(indent=1) if json else describe_status(current))


@app.command()
def results(
    directory: StudyDir,
    format: Annotated[str, typer.Option(help="table, json or csv.")] = "table",
    frontier: Annotated[bool, typer.Option("--frontier", help="Only the Pareto frontier.")] = False,
) -> None:
    """One row per candidate."""
    from analysis.load import load
    from analysis.tables import results_table

    frame = load(directory)
    warn_of(frame.attrs["damage"])
    print(results_table(frame, format, frontier), end="")


@app.command()
def report(
    directory: StudyDir,
    out: Annotated[str | None, typer.Option(help="File to write.")] = None,
    max_drop: Annotated[list[str] | None, typer.Option(help="METRIC=POINTS@95% that its answer may lose; 1 point or 1 % of the "
                                                            "objective by default.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Write it again and again while a driver runs; an open page follows.")
                     ] = False,
    paper: Annotated[bool, typer.Option("--paper", help="Print the tables of arXiv 2310.04573 with ours instead.")] = False,
) -> None:
    """Write one self-contained report.html: the answer first, then the frontier and everything behind it."""
    from analysis.load import load

    frame = load(directory)
    warn_of(frame.attrs["damage"])
    if paper:
        from analysis.paper import paper_tables

        print(paper_tables(frame), end="")
        return
    from analysis.page import watch_page, write_page

    echo(str(write_page(directory, out, frame, max_drop or ())))
    if watch:
        watch_page(directory, out, max_drop or ())


@app.command()
def notebook(
    directories: Annotated[list[str], typer.Argument(help="One study: its report; several: their comparison.", metavar="DIR")],
    out: Annotated[Path | None, typer.Option(help="File to write; in the current folder by default.")] = None,
) -> None:
    """Write a notebook that is bound to a study, or to several."""
    from analysis.notebook import write_notebook

    echo(str(write_notebook(directories, out)))


@app.command()
def pick(
    directory: StudyDir,
    max_bytes: Annotated[str | None, typer.Option(help="Stored bytes: 300MB, 1.2GB.")] = None,
    max_nonzero: Annotated[str | None, typer.Option(help="Non-zero parameters: 24M.")] = None,
    max_drop: Annotated[list[str] | None, typer.Option(help="METRIC=POINTS lost at most against dense; METRIC=POINTS@95% with "
                                                            "that confidence.")] = None,
    max_resident: Annotated[str | None, typer.Option(help="Bytes in memory when it is served, as --max-bytes.")] = None,
    max_predicted_ms: Annotated[float | None, typer.Option(help="Of a batch, where the search asks for predicted_ms.")] = None,
    max_ms: Annotated[float | None, typer.Option(help="Decoding of a step, as `raysearch measure` found.")] = None,
    min_tokens_per_s: Annotated[float | None, typer.Option(help="Scoring, as `raysearch measure` found.")] = None,
    min: Annotated[list[str] | None, typer.Option(help="METRIC=VALUE at least.")] = None,
    max: Annotated[list[str] | None, typer.Option(help="METRIC=VALUE at most.")] = None,
    candidate: Annotated[str | None, typer.Option(help="This one, as TRIAL/ROUND or a key, instead of limits.")] = None,
    representatives: Annotated[int | None, typer.Option(help="Show this many that stand for the frontier; picks none.")] = None,
    out: Annotated[str | None, typer.Option(help="File to write; DIR/pick.json by default.")] = None,
) -> None:
    """Choose the smallest candidate that satisfies every constraint, on the report split."""
    from analysis.constraints import parse_constraints
    from analysis.load import load
    from analysis.pick import describe_pick, write_pick
    from analysis.pick import pick as choose
    from raysearch.study.storage import location

    constraints = parse_constraints(max_bytes, max_nonzero, max_drop or (), min or (), max or (), max_resident, max_ms,
                                    min_tokens_per_s, max_predicted_ms)
    frame = load(directory)
    warn_of(frame.attrs["damage"])
    if representatives is not None:
        from analysis.representatives import describe_representatives
        from analysis.representatives import representatives as of

        echo(describe_representatives(of(frame, representatives)) + "\nchoose one with --candidate")
        return
    picked = choose(frame, constraints, candidate)
    path = write_pick(picked, out or location(directory) / "pick.json")
    echo(describe_pick(picked) + f"\n{path}")


@app.command()
def measure(
    directory: StudyDir,
    batch_sequences: Annotated[int | None, typer.Option(min=1, help="Sequences at a time; the study's by default.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of each sequence.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="That each sequence gets, one at a time.")] = None,
) -> None:
    """Time the frontier as it would be served, dense beside it, on this machine, which nothing else should use meanwhile."""
    doing("timing")
    from raysearch.measure import measure as run

    given = {"batch_sequences": batch_sequences, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    num_timed = run(directory, {name: value for name, value in given.items() if value is not None}, echo)
    echo(f"{num_timed} candidates timed; raysearch results {shlex.quote(directory)} shows them")


@app.command()
def compare(
    directory: StudyDir,
    one: Annotated[str, typer.Argument(help="TRIAL/ROUND, a key, or dense.", metavar="A")],
    other: Annotated[str, typer.Argument(help="The same.", metavar="B")],
) -> None:
    """Whether one of two candidates is better, item by item, and how many items would tell."""
    from analysis.compare import compare as of_both
    from analysis.compare import describe_comparison
    from analysis.load import load

    frame = load(directory)
    warn_of(frame.attrs["damage"])
    echo(describe_comparison(of_both(frame, one, other)))


@app.command()
def export(
    pick_file: Annotated[str, typer.Argument(help="pick.json of `raysearch pick`.", metavar="PICK")],
    out: Out,
    format: Annotated[str, typer.Option(help="hf: for transformers, vLLM and others, zeros and all; compact: what is left when "
                                             "dead parts are cut out; sparse: bitmaps, for raysearch.load.")] = "hf",
) -> None:
    """Write the picked candidate as a deployment folder."""
    doing("exporting")
    from analysis.pick import read_pick

    echo(str(raysearch.export(read_pick(pick_file), out, format, echo)))


@app.command()
def verify(
    what: Annotated[str, typer.Argument(help="Deployment folder, or pick.json of `raysearch pick`.", metavar="FOLDER|PICK")],
    data_dir: Annotated[str | None, typer.Option(help="Where the study's evaluation files are now.")] = None,
    corpus: Annotated[str | None, typer.Option(help="Where its corpus is now.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task; all by default.")] = None,
) -> None:
    """Score a deployment folder or a picked candidate again, and compare it item by item with its study; time it again if that
    was done on this device."""
    doing("scoring")
    from tempfile import TemporaryDirectory

    from analysis.tables import aligned
    from raysearch.deploy.verify import verify as run
    from raysearch.deploy.verify import verify_speed

    notes: list[str] = []
    with TemporaryDirectory() as aside:
        folder = Path(what)
        if not folder.is_dir():
            from analysis.pick import check_pick, read_pick
            from raysearch.deploy.export import export as write
            from raysearch.study.ledger import Ledger

            picked = read_pick(what)
            check_pick(picked, echo)
            folder = write(Ledger.open(picked.study_directory), picked.key, Path(aside) / "deploy")
        compared, timed = run(folder, data_dir, corpus, limit), verify_speed(folder, notes.append)
    rows = [[each.metric, f"{each.recorded:.6g}", f"{each.found:.6g}", str(each.num_items), str(each.num_differing)]
            for each in compared]
    notes += [f"{each.name}: {each.found:.3g} of the dense model's time, {each.recorded:.3g} in the study" for each in timed]
    echo(aligned(["metric", "in the study", "here", "items", "differing"], rows, left=["metric"])
         + "\n".join([*notes, f"{what}: verified"]))


@app.command()
def add(
    directory: StudyDir,
    folder: Annotated[Path, typer.Argument(help="A model that transformers or raysearch.load opens.")],
    name: Annotated[str, typer.Option(help="What it is called beside the frontier.")],
) -> None:
    """Score a quantised, smaller or otherwise made model on a study's items, to stand beside its frontier."""
    doing("scoring")
    from raysearch.add import add as run

    record = run(directory, folder, name, echo)
    echo(f"{record.key}: raysearch compare {shlex.quote(directory)} dense {record.key}")


@app.command()
def replicate(
    pick_file: Annotated[str, typer.Argument(help="pick.json of `raysearch pick`.", metavar="PICK")],
    seeds: Annotated[int, typer.Option(min=2, help="Other seeds of the order of the text and of what is drawn from it.")] = 3,
) -> None:
    """Run a picked candidate's rounds again with other seeds: how far its numbers spread, beside the items' error."""
    doing("training")
    from analysis.load import load
    from analysis.pick import read_pick
    from analysis.replicas import describe_spread, spread
    from raysearch.replicate import REPLICAS
    from raysearch.replicate import replicate as run
    from raysearch.study.storage import location

    picked = read_pick(pick_file)
    made = run(picked.study_directory, picked.key, seeds, echo)
    echo(describe_spread(spread(load(picked.study_directory), picked.key, made)))
    replicas = shlex.quote(str(location(picked.study_directory) / REPLICAS))
    echo(f"the replicas are a study of their own, and on no frontier of this one: raysearch results {replicas}")


@app.command()
def finish(
    pick_file: Annotated[str, typer.Argument(help="pick.json of `raysearch pick`.", metavar="PICK")],
    epochs: Annotated[float, typer.Option(help="Of the study's, that it is trained more.")],
    learning_rate: Annotated[float | None, typer.Option(help="Peak; without it that of the candidate's last round.")] = None,
    distill_alpha: Annotated[float, typer.Option(help="Share of the dense model's logits in the loss; this did best at 50 %."
                                                 )] = 0.67,
) -> None:
    """Train a picked candidate longer, its masks held, with the dense model as teacher: one more candidate of the study."""
    doing("training")
    from analysis.pick import read_pick
    from raysearch.finish import finish as run

    picked = read_pick(pick_file)
    trial = run(picked.study_directory, picked.key, epochs, echo, learning_rate=learning_rate, distill_alpha=distill_alpha)
    study = shlex.quote(picked.study_directory)
    echo(f"raysearch compare {study} {picked.key} {trial.keys[-1]}\nraysearch pick {study} --candidate "
         f"{trial.number}/{len(trial.keys)}")


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="Deployment folder, or any model's.")],
    prompt: str,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 50,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
) -> None:
    """Go on with a prompt, as the folder's generation settings say."""
    doing("generating")
    from raysearch.deploy.generate import generate as run

    echo(run(folder, prompt, max_new_tokens, chat))
