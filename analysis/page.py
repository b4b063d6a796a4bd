"""One self-contained HTML page about a study: opens anywhere, loads nothing from a network.

What it says is put together here; how it looks is in templates/: page.html (Jinja2, which escapes what is not ours), page.css,
page.js and parallel.js.
"""

import functools
import gzip
import json
import math
import shlex
import time
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.offline
from markupsafe import Markup
from plotly.utils import PlotlyJSONEncoder

from analysis.candidates import (
    candidates,
    control,
    control_rows,
    dense,
    front_probability,
    frontier,
    frontier_split,
    pruned,
    quality,
    relative_hypervolume,
    setting,
)
from analysis.compare import compare
from analysis.constraints import Constraint, parse_constraints
from analysis.findings import default_limit, headlines, optimism
from analysis.importance import dependence, importance
from analysis.load import load, metric_names
from analysis.parallel import parallel_coordinates
from analysis.pick import pick
from analysis.plots import MAX_DEPENDENCE, dependence_figure, frontier_figure, importance_figure, trajectory_figure, trial_texts
from analysis.reproduce import study_options
from analysis.studies import progress_figure
from analysis.tables import describe_config, metric_pair, with_stderr
from raysearch.config import higher_is_better
from raysearch.study.collector import without_collector
from raysearch.study.files import new_file
from raysearch.study.ledger import Ledger
from raysearch.study.records import StudyRecord
from raysearch.study.storage import AnyPath, location
from raysearch.units import human_bytes, human_count

WATCH_S = 20.0
MAX_ROWS = 200
"""Of a table of candidates."""


def watch_page(directory: str | AnyPath, out: str | AnyPath | None = None, max_drop: Sequence[str] = ()) -> None:
    """Writes the page now and every WATCH_S seconds while a driver runs, for a browser that reads it again as often; the last
    one is as `write_page` leaves it."""
    ledger, goes_on = Ledger.open(directory), True
    while goes_on:
        goes_on, _ = ledger.driver()  # before what it wrote last is read
        write_page(directory, out, max_drop=max_drop, again_s=WATCH_S if goes_on else None)
        time.sleep(WATCH_S * goes_on)


@without_collector()
def write_page(directory: str | AnyPath, out: str | AnyPath | None = None, frame: pd.DataFrame | None = None,
               max_drop: Sequence[str] = (), again_s: float | None = None) -> AnyPath:
    """Writes `out` (default: report.html in the study directory) and returns its absolute path. `frame`: the study, where it
    was loaded already; `max_drop`: METRIC=NUMBER@95%, what the answer may lose, 1 point or 1 % of the objective by default;
    `again_s`: the browser reads the file again after so many seconds.

    Works at any moment of a study, with no candidate too. ValueError when there is no study or `out` is a folder."""
    frame = load(directory) if frame is None else frame
    ledger = Ledger.open(directory)
    path = location(out) if out is not None else ledger.directory / "report.html"
    if path.is_dir():
        raise ValueError(f"the page must be a file, got the folder {path}; name the file, such as {path}/report.html")
    page = _page(frame, ledger.study(), parse_constraints(max_drop=max_drop), again_s)
    with new_file(path) as file:
        file.write_text(page, encoding="utf-8")
    return path


def _page(frame: pd.DataFrame, record: StudyRecord, constraints: Sequence[Constraint], again_s: float | None) -> str:
    templates = files("analysis") / "templates"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    ranked, importance_caption = _importance(frame)
    texts, parallel = trial_texts(frame), parallel_coordinates(frame)
    figures = {"frontier": frontier_figure(frame, None, texts), "trajectories": trajectory_figure(frame, texts), **ranked,
               "progress": progress_figure({"hypervolume": frame})}
    if frontier_split(frame) == "report":
        figures["selection"] = frontier_figure(frame, "selection", texts)
    return environment.from_string((templates / "page.html").read_text()).render(
        again_s=again_s, title=f"{PurePath(record.study.model.path).name}: {record.space}", meta=_meta(frame, record),
        style=Markup((templates / "page.css").read_text()), plotly=_packed_plotly(),
        script=Markup((templates / "parallel.js").read_text() + (templates / "page.js").read_text()),
        data=Markup(_data(frame, record, figures, texts, parallel)), has_parallel=parallel is not None,
        heights={name: figure.layout.height for name, figure in figures.items()},
        directory=shlex.quote(setting(frame, "directory")), cards=_cards(frame),
        answer=_answer(frame, constraints), headlines=headlines(frame),
        frontier_caption=_frontier_caption(frame), front=_frontier_table(frame), optimism=_optimism_table(frame),
        importance_caption=importance_caption, ends=_ends(frame), method=_method(frame, record))


@functools.cache
def _packed_plotly() -> str:
    """Plotly's script, 4.8 MB, in 2: page.js unpacks it."""
    return b64encode(gzip.compress(plotly.offline.get_plotlyjs().encode(), mtime=0)).decode()


def _data(frame: pd.DataFrame, record: StudyRecord, figures: dict[str, go.Figure], texts: dict[int, str],
          parallel: dict[str, Any] | None) -> str:
    """What page.js reads, as JSON that may stand in a script. Points name their trial, whose text is there once."""
    number_of: dict[str, int] = {text: number for number, text in texts.items()}
    plain = {}
    for name, figure in figures.items():
        plain[name] = figure.to_dict()
        for button in [button for menu in plain[name]["layout"].get("updatemenus", ()) for button in menu["buttons"]]:
            points = button["args"][0]  # plotly packs the numbers of traces, and not those of buttons
            packed = [b64encode(np.asarray(x, np.float32).tobytes()).decode() for x in points["x"]]
            points["x"] = [{"dtype": "f4", "bdata": each} for each in packed]
        for trace in plain[name]["data"]:
            if name not in ("importance", "dependence", "progress") and trace.get("text") is not None:
                trace["text"] = [number_of.get(text) for text in trace["text"]]
    reported = pruned(frame)[lambda rows: quality(rows, "report").notna()][["trial", "round"]]
    return json.dumps({
        "figures": plain, "parallel": parallel, "texts": texts, "directory": shlex.quote(setting(frame, "directory")),
        "trial": shlex.quote(str(location(setting(frame, "directory")) / "trials" / "NUMBER.json")),
        "prune": study_options(record.study), "reported": [f"{trial}/{depth}" for trial, depth in reported.to_numpy()]},
                      cls=PlotlyJSONEncoder, separators=(",", ":")).replace("<", "\\u003c")


def _answer(frame: pd.DataFrame, constraints: Sequence[Constraint]) -> dict[str, Any]:
    """The smallest candidate within the limits, or why there is none."""
    asked = words = ""
    try:
        if not constraints:
            words = f" ({'1 point' if higher_is_better(setting(frame, 'objective')) else '1 %'} of dense)"
            constraints = parse_constraints(max_drop=[default_limit(frame)])
        asked = f"Within {' '.join(map(str, constraints))}{words}: "
        picked, baseline = pick(frame, constraints), dense(frame)
    except ValueError as error:
        return {"lead": f"{asked}{error}", "sizes": []}
    assert baseline is not None
    table, row = compare(frame, "dense", picked.key), frame[frame["key"] == picked.key].iloc[0]
    matters = {setting(frame, "objective"), *(check.constraint.metric for check in picked.checks)}
    table = table.sort_values("metric", key=lambda metrics: ~metrics.isin(matters), kind="stable")
    limits = " ".join(map(str, constraints))
    where = shlex.quote(setting(frame, "directory"))
    sizes = {"non-zero parameters": (human_count, picked.num_nonzero, picked.dense_num_nonzero),
             "stored": (human_bytes, picked.stored_bytes, picked.dense_stored_bytes),
             "resident": (human_bytes, picked.resident_bytes, int(baseline["resident_bytes"]))}
    costs = [[row["metric"], f"{row['difference']:+.4g}", f"{row['low']:+.4g} to {row['high']:+.4g}", f"{row['b']:.4g}",
              f"{row['a']:.4g}", f"{row['num_items']:,}"] for _, row in table.iterrows()]
    bounds = "; ".join(f"{check.constraint.metric} {check.value:.3g}, at most {check.bound:.3g}" for check in picked.checks
                       if check.bound is not None and check.constraint.kind == "max_drop")
    return {
        "lead": f"Trial {picked.trial} round {picked.round} is the smallest candidate within {limits}{words}. Its drop: "
                f"{bounds or 'as below'}. It was pruned {describe_config(row)}.",
        "sizes": [(form(value), f"{name}, {value / of_dense:.0%} of dense") for name, (form, value, of_dense) in sizes.items()],
        "header": ("metric", "change", "95 % interval", "this", "dense", "items"), "costs": costs,
        "caption": f"On the {table.attrs['split']} split, item by item against the dense baseline; an interval that holds 0 is "
                   "no change that these items can tell."
                   + "".join(f" Left out: {reason}." for reason in table.attrs["left_out"]),
        "deploy": [("choose it", f"raysearch pick {where} {limits.replace(',', '')} --out pick.json"),
                   ("write the folder, which is opened and scored again", "raysearch export pick.json --out deploy"),
                   ("score it again, item by item against the study", "raysearch verify deploy"),
                   ("score it on other data", "raysearch evaluate deploy --tasks lambada")]}


def _meta(frame: pd.DataFrame, record: StudyRecord) -> str:
    trials = frame.dropna(subset=["trial"]).drop_duplicates("trial")["status"].value_counts()
    counts = ", ".join(f"{count} {status}" for status, count in trials.items())
    return " · ".join([record.provenance.created_at[:10], setting(frame, "device"),
                       f"trials: {counts}" if len(trials) else "no trial yet", f"{record.study.model.path}"])


def _cards(frame: pd.DataFrame) -> list[tuple[str, str]]:
    front = frontier(frame)
    hypervolume, rounds = relative_hypervolume(frame), frame[(frame["status"] != "dense") & ~frame["is_alias"]]
    times = {name: float(rounds[f"{name}_s"].sum()) for name in ("prune", "finetune", "evaluate")}
    return [(str(len(pruned(frame))), "candidates"),
            (str(int((front["status"] != "dense").sum())), f"on the frontier ({frontier_split(frame)} split)"),
            ("-" if math.isnan(hypervolume) else f"{hypervolume:.3f}", "hypervolume, relative to dense"),
            (_time(sum(times.values())), "computing, all rounds: " + ", ".join(
                f"{name} {_time(seconds)}" for name, seconds in times.items()))]


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _frontier_caption(frame: pd.DataFrame) -> str:
    """Which candidates are in the picture of which split, and why the two must not be compared."""
    made = pruned(frame)
    num_scored = {split: int(quality(made, split).notna().sum()) for split in ("selection", "report")}
    in_amber = ("" if control(frame) is None else " In amber: the dense control, which has the longest trial's fine-tuning and "
                "is not pruned. What it gains on the baseline, candidates owe to training and not to pruning.")
    colours = ("Blue: candidates that no other one beats in both size and quality; the band holds, all along at 95 %, the best "
               "quality that candidates of a size or less would have on other items on which dense stays where it is. Grey: "
               f"all candidates. Dotted: the dense baseline.{in_amber}")
    if setting(frame, "speed"):
        colours += " Measured times are over those of the dense model beside it; who was not measured is not in their picture."
    if frontier_split(frame) == "report":
        splits = (f"The report split, which the search never saw, was scored for the {num_scored['report']} of {len(made)} "
                  f"candidates that the search chose; choose from these. The {num_scored['selection']} candidates scored on "
                  "the selection split are in a picture of their own below: the search chose by those values, so they flatter "
                  "what it chose, and a value of one split says nothing beside a value of the other.")
    else:
        splits = (f"Nothing has been scored on the report split yet, so this shows the {num_scored['selection']} of "
                  f"{len(made)} candidates scored on the selection split. The search chooses by these values, so they "
                  "flatter what it chose: expect the report split to be a little worse. Run the sweep to its end.")
    num_raced = int(made["dominated_by"].notna().sum())
    raced = f" {num_raced} whose scoring a race stopped early are in neither picture." if num_raced else ""
    return f"{colours} {splits}{raced}"


def _frontier_table(frame: pd.DataFrame) -> dict[str, Any]:
    split, front, objective = frontier_split(frame), frontier(frame), setting(frame, "objective")
    if front.empty:
        return {"rows": [], "num_left_out": 0}
    front = front.assign(front_probability=front_probability(frame, split))
    # the other metrics of its task are the same number in another unit, or nearly, and a screen does not hold them all
    others = [name for name in metric_names(front, split) if name.partition("/")[0] != objective.partition("/")[0]]
    speeds = [name for name in ("predicted_ms", "decode_ms", "scoring_tokens_per_s") if front[name].notna().any()]
    header = ["candidate", objective.replace("/", "/ "), "P(front)", "stored", "sparsity", "how it was pruned", "non-zero",
              "resident", *(name.replace("_", " ") for name in speeds),
              *(name.replace("/", "/ ") for name in others)]  # what a choice needs stands first
    baseline = candidates(frame)[lambda rows: (rows["status"] == "dense") & ~rows["key"].isin(front["key"])]
    rows = []
    for _, row in pd.concat([front, baseline, control_rows(frame), frame[frame["status"] == "other"]]).iterrows():
        score, *scores = [with_stderr(*metric_pair(row, name, split)) for name in (objective, *others)]
        rows.append([str(row["status"]) if pd.isna(row["trial"]) else f"{row['trial']}/{row['round']}", score,
                     "-" if pd.isna(row["front_probability"]) else f"{row['front_probability']:.2f}",
                     human_bytes(row["stored_bytes"]), f"{row['sparsity']:.3f}", describe_config(row),
                     human_count(row["num_nonzero"]), human_bytes(row["resident_bytes"]),
                     *("-" if pd.isna(row[name]) else f"{row[name]:.3g}" if row[name] < 1000 else human_count(row[name])
                       for name in speeds), *scores])
    return {"header": header, "rows": rows[:MAX_ROWS], "num_left_out": max(0, len(rows) - MAX_ROWS)}


def _optimism_table(frame: pd.DataFrame) -> dict[str, Any]:
    rows = optimism(frame)
    if rows.empty:
        return {"rows": [], "caption": ""}
    cells = [[f"{row['trial']}/{row['round']}", f"{row['optimism']:+.4f} ± {row['optimism_stderr']:.4f}",
              f"{row['selection_loss']:+.4f}", f"{row['report_loss']:+.4f}", f"{row['sparsity']:.3f}"]
             for _, row in rows.head(MAX_ROWS).iterrows()]
    return {"header": ["candidate", "optimism", "loss on selection", "loss on report", "sparsity"], "rows": cells,
            "caption": f"Candidates on the frontier of the selection split: loss of {setting(frame, 'objective')} against the "
                       f"dense baseline of the same split (positive is worse). Mean optimism: {rows['optimism'].mean():+.4f}; "
                       "above 0 the selection split made the chosen candidates look better than they are."}


def _importance(frame: pd.DataFrame) -> tuple[dict[str, go.Figure], str]:
    """(the figures by name, none where there is too little to say; what they show, or why there is none)."""
    try:
        table, effects = importance(frame), dependence(frame)
    except ValueError as error:
        return {}, f"Not shown: {error}."
    pool = pruned(frame)
    return {"importance": importance_figure(table, frame), "dependence": dependence_figure(table, effects, frame)}, (
        f"From {len(pool)} candidates of {pool['trial'].nunique()} trials, selection split: the objective is ranked, a "
        "cubic in the rank of the size is taken out, and a bar is the share of the remaining variance that the levels "
        "of one hyper-parameter explain (adjusted eta squared). Grey bars do not exceed what reshuffled trials give in "
        "95 % of cases (the tick). Hyper-parameters that vary together share their credit; this is association in the "
        f"trials that were run, not cause. Below, level by level, for the {min(MAX_DEPENDENCE, len(table))} most important: by "
        "how much of all candidates those of a level are ahead of what their size says, on average, with two standard errors "
        "over trials. These are marginal means of what was run: no model holds the other hyper-parameters fast.")


def _ends(frame: pd.DataFrame) -> list[list[str]]:
    of_control = (frame["status"] == "control") & frame["reason"].notna()
    rows = frame[frame["status"].isin(["failed", "stopped"]) | of_control]
    rounds = rows["round"].notna().groupby([rows["trial"], rows["reason"]], dropna=False).transform("sum")
    ended = rows.assign(num_rounds=rounds).drop_duplicates(["trial", "reason"])  # controls have no number
    return [["-" if pd.isna(row["trial"]) else str(row["trial"]), str(row["status"]), str(int(row["num_rounds"])),
             describe_config(row), "not recorded" if pd.isna(row["reason"]) else str(row["reason"])]
            for row in ended.sort_values(["trial", "reason"]).to_dict("records")]


def _method(frame: pd.DataFrame, record: StudyRecord) -> list[tuple[str, str]]:
    study, trains = record.study, bool(frame["trained_tokens"].fillna(0).gt(0).any())
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record.provenance.versions.items()))
    return [
        ("non-zero parameters", "parameters of the whole model that are not zero; tied weights count once. Sparsity is "
         "the share of zeros among the prunable weights."),
        ("stored bytes", "tensor bytes of the smallest export, its file's header apart: bitmaps and kept values where those "
         "are smaller than dense matrices (sparse), or what is left when dead parts are cut out (compact)."),
        ("resident bytes", "tensor bytes in memory when it is served as plain matrices: unstructured zeros do not lower them."),
        ("selection split", f"what the search saw and optimised ({study.search.objective})."),
        ("report split", "other documents, scored only for the candidates that the search chose, and for the dense "
         "baseline."),
        ("standard error", "over the items of a task, as lm-eval gives it; it does not cover the luck of the training "
         "seed, which `raysearch replicate` measures."),
        ("dense control", "the dense model after the longest trial's rounds of fine-tuning, with that trial's learning rate, "
         "without pruning and L1: what a candidate gains from training alone. It is the control of a pruned model only at "
         "that learning rate; another one may suit the dense model better or worse." if study.search.dense_control and trains
         else "off (dense_control): part of what a candidate gains is its fine-tuning." if trains
         else "none, since nothing was fine-tuned."),
        ("speed", f"as `raysearch measure` found: {how}. Medians beside the dense model, in the same process and in turn; a "
         "few per cent are noise." if (how := setting(frame, "speed")) else
         "not measured: fewer non-zero parameters do not by themselves make a model faster (raysearch measure)."),
        ("model", study.model.path), ("corpus", study.data.corpus or "none"), ("tasks", ", ".join(study.evaluation.tasks)),
        ("prunable", study.model.prunable), ("precision, ranks", f"{study.model.dtype}, ZeRO "
         f"{study.cluster.zero_stage}, {study.cluster.num_ranks} rank(s), seed {study.data.seed}"),
        ("hardware", setting(frame, "device")), ("host", record.provenance.hostname),
        ("made", record.provenance.created_at), ("git commit", record.provenance.git_commit or "not recorded"),
        ("versions", versions), ("study directory", setting(frame, "directory")),
    ]
