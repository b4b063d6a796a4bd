"""One self-contained HTML page about a study: opens anywhere, loads nothing from a network."""

import html
import math
from collections.abc import Sequence
from pathlib import PurePath

import pandas as pd
import plotly.graph_objects as go
import plotly.offline

from analysis.candidates import (
    candidates,
    control,
    control_rows,
    dense,
    front_probability,
    frontier,
    frontier_split,
    knee_of,
    losses,
    pruned,
    quality,
    quality_stderr,
    relative_hypervolume,
    relative_hypervolume_interval,
    setting,
)
from analysis.importance import importance
from analysis.load import load, metric_names
from analysis.plots import SIZE_NAMES, frontier_figure, importance_figure, trajectory_figure
from analysis.tables import describe_config, metric_pair, with_stderr
from raysearch.config import higher_is_better
from raysearch.study.files import new_file
from raysearch.study.ledger import Ledger, Split
from raysearch.study.records import StudyRecord
from raysearch.study.storage import AnyPath, location
from raysearch.units import human_bytes, human_count


def write_page(directory: str | AnyPath, out: str | AnyPath | None = None, frame: pd.DataFrame | None = None) -> AnyPath:
    """Writes `out` (default: report.html in the study directory) and returns its absolute path. `frame`: the study, where it
    was loaded already.

    Works at any moment of a study, with no candidate too. ValueError when there is no study or `out` is a folder."""
    frame = load(directory) if frame is None else frame
    ledger = Ledger.open(directory)
    path = location(out) if out is not None else ledger.directory / "report.html"
    if path.is_dir():
        raise ValueError(f"the page must be a file, got the folder {path}; name the file, such as {path}/report.html")
    page = _page(frame, ledger.study())
    with new_file(path) as file:
        file.write_text(page, encoding="utf-8")
    return path


def headlines(frame: pd.DataFrame) -> list[str]:
    """What the study found, in sentences with numbers (plain text)."""
    split, size, baseline = frontier_split(frame), setting(frame, "size"), dense(frame)
    made = pruned(frame)
    scored = made[quality(made, split).notna()]
    if baseline is None or scored.empty or pd.isna(baseline[f"{split}/{setting(frame, 'objective')}"]):
        return ["No candidate can be compared with the dense baseline yet."]
    trained = _scored_control(frame, split)
    sentences = [_describe_smallest(frame, smallest, words, split)
                 for words, smallest in _nearest(scored, baseline, trained, split)]
    front = frontier(frame)
    num_front = int((front["status"] != "dense").sum())
    sentences.append(f"{num_front} of {len(scored)} candidates scored on the {split} split are on the frontier, from "
                     f"sparsity {front['sparsity'].min():.2f} to {front['sparsity'].max():.2f}; {len(made)} candidates "
                     f"were made in all. Hypervolume {relative_hypervolume(frame):.3f} ({_interval(frame, split)}relative to "
                     f"dense in size, by {SIZE_NAMES[size]}, and in quality; half the size at equal quality alone gives 0.5).")
    if (bend := knee_of(frame, split)) is not None and bend["status"] != "dense":
        sentences.append(f"The frontier bends most at trial {bend['trial']} round {bend['round']} (sparsity "
                         f"{bend['sparsity']:.2f}, {setting(frame, 'objective')} "
                         f"{with_stderr(*metric_pair(bend, setting(frame, 'objective'), split))}): smaller ones lose more for "
                         "what they save.")
    if trained is not None:
        sentences.append(_gain_of_training(frame, baseline, trained, split))
    if (sentence := _better(scored, baseline, trained, split)) is not None:
        sentences.append(sentence)
    return sentences


def _interval(frame: pd.DataFrame, split: Split) -> str:
    low, high = relative_hypervolume_interval(frame, split)
    return "" if math.isnan(low) else f"{low:.3f} to {high:.3f} on other items, at 95 %; "


def _nearest(scored: pd.DataFrame, baseline: pd.Series, trained: pd.Series | None, split: str
             ) -> list[tuple[str, pd.DataFrame]]:
    """(limit in words, the smallest candidate within it) around dense and, where there is one, the dense control `trained`. The
    limit is fixed: one of standard errors would grow bolder the fewer items there are."""
    objective = setting(scored, "objective")
    words = "1 point" if higher_is_better(objective) else "1 %"
    found = []
    for name, reference in (("dense", baseline), ("the dense control", trained)):
        if reference is not None:
            limit = 0.01 if higher_is_better(objective) else 0.01 * abs(reference[f"{split}/{objective}"])
            found.append((f"{words} of {name}", _smallest(scored[losses(scored, reference, split)[0] <= limit], split)))
    if len(found) == 2 and found[0][1]["key"].tolist() == found[1][1]["key"].tolist():
        return [(f"{words} of dense, and of the dense control", found[0][1])]
    return found


def _better(scored: pd.DataFrame, baseline: pd.Series, trained: pd.Series | None, split: str) -> str | None:
    """How many candidates are better than dense, and what that says; None where none is."""
    loss, noise = losses(scored, baseline, split)
    better = scored[loss < -noise]
    if better.empty:
        return None
    sentence = f"Better than the dense baseline by more than one standard error: {len(better)}"
    if trained is not None:
        loss, noise = losses(scored, trained, split)
        return f"{sentence}; than the dense control: {int((loss < -noise).sum())}."
    num_trained = int((better["trained_tokens"] > 0).sum())
    if num_trained:
        which = "them" if num_trained == len(better) else f"{num_trained} of them"
        sentence += (f". Fine-tuning trained {which} further than the baseline, so this says that the baseline was not trained "
                     "to its end, not that pruning helps")
    return f"{sentence}."


def _scored_control(frame: pd.DataFrame, split: str) -> pd.Series | None:
    """The dense control where it can be compared on `split`."""
    rows = control_rows(frame)
    return None if quality(rows, split).dropna().empty else rows.iloc[0]


def _gain_of_training(frame: pd.DataFrame, baseline: pd.Series, trained: pd.Series, split: str) -> str:
    objective = setting(frame, "objective")
    (loss,), (stderr,) = losses(control_rows(frame), baseline, split)
    scores = [with_stderr(*metric_pair(row, objective, split)) for row in (trained, baseline)]
    return (f"The dense control, which has the longest trial's fine-tuning and is not pruned, is at {objective} {scores[0]}, "
            f"dense at {scores[1]}: fine-tuning alone gains {with_stderr(-loss, stderr)}.")


def optimism(frame: pd.DataFrame) -> pd.DataFrame:
    """Selection against report, for the candidates that the search chose (the frontier of the selection split, where
    scored on both): `selection_loss` and `report_loss` are the losses against the dense baseline on each split, in
    the objective's unit, positive when worse; `optimism` = report_loss - selection_loss, above 0 when the selection
    split flattered the choice; `optimism_stderr` as if the splits' errors were independent."""
    rows = frontier(frame, "selection")
    rows = rows[(rows["status"] != "dense") & quality(rows, "report").notna()]
    baseline = frame[frame["status"] == "dense"]
    if baseline.empty or rows.empty:
        return rows.head(0).assign(selection_loss=[], report_loss=[], optimism=[], optimism_stderr=[])
    variance = pd.Series(0.0, index=rows.index)
    for split in ("selection", "report"):
        rows = rows.assign(**{f"{split}_loss": quality(baseline, split).iloc[0] - quality(rows, split)})
        variance += (quality_stderr(rows, split).fillna(0) ** 2
                     + quality_stderr(baseline, split).fillna(0).iloc[0] ** 2)
    return rows.assign(optimism=rows["report_loss"] - rows["selection_loss"], optimism_stderr=variance**0.5)


def _smallest(good: pd.DataFrame, split: str) -> pd.DataFrame:
    """The row of the smallest of these candidates, the better one of equal ones; none of none."""
    return good.assign(minus=-quality(good, split)).sort_values([setting(good, "size"), "minus", "key"]).head(1)


def _describe_smallest(frame: pd.DataFrame, smallest: pd.DataFrame, words: str, split: str) -> str:
    """The one row or none of `_smallest`, as within `words`, with what it loses where there is a dense control."""
    if smallest.empty:
        return f"No candidate is within {words}."
    objective = setting(frame, "objective")
    best, baseline, trained = smallest.iloc[0], frame[frame["status"] == "dense"].iloc[0], _scored_control(frame, split)
    value, reference = (with_stderr(*metric_pair(row, objective, split)) for row in (best, baseline))
    compared = ""
    if trained is not None:
        to_dense, to_control = (with_stderr(*(float(column.iloc[0]) for column in losses(smallest, row, split)))
                                for row in (baseline, trained))
        compared = (f", dense control {with_stderr(*metric_pair(trained, objective, split))}: a drop of {to_dense} against "
                    f"dense and of {to_control} against the control")
    share, stored_share = (best[name] / baseline[name] for name in ("num_nonzero", "stored_bytes"))
    return (f"Smallest within {words}: sparsity {best['sparsity']:.2f} (trial {best['trial']} round "
            f"{best['round']}), {human_count(best['num_nonzero'])} non-zero parameters ({share:.0%} of dense), "
            f"{human_bytes(best['stored_bytes'])} stored ({stored_share:.0%}), {objective} {value}, "
            f"dense {reference}{compared}.")


def _page(frame: pd.DataFrame, record: StudyRecord) -> str:
    """The whole page; every string that is not ours goes through html.escape."""
    title = f"{PurePath(record.study.model.path).name}: {record.space}"
    points = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in headlines(frame))
    sections = [
        _section("Frontier", _plot(frontier_figure(frame), "frontier"), _frontier_caption(frame)),
        _section("Candidates on the frontier", _frontier_table(frame), "Smallest first. P(front) is the share of 1,000 "
                 "resamples of the items, by whole documents and the same ones for all candidates, in which the candidate is "
                 "on the frontier: near 1 it is there beyond noise, near 0.5 it cannot be told from a neighbour."),
        _section("Does the selection flatter?", *_optimism_table(frame)),
        _section("Trajectories", _plot(trajectory_figure(frame), "trajectories"),
                 "Every trial from the dense baseline on, one colour per trial (dark: early, light: late), round by "
                 "round, on the selection split. The last marker says how the trial ended. A round that two trials "
                 "share was computed once."),
        _section("What matters at equal size", *_importance(frame)),
        _section("Trials that failed or were stopped", *_ends(frame)),
        _section("How these numbers were made", _method(frame, record), ""),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)} · raysearch</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
<script>{plotly.offline.get_plotlyjs()}</script>
</head>
<body>
<main>
<header>
<p class="kicker">raysearch study</p>
<h1>{html.escape(title)}</h1>
<p class="meta">{html.escape(_meta(frame, record))}</p>
</header>
{_cards(frame)}
<ul class="headlines">{points}</ul>
{"".join(sections)}
</main>
</body>
</html>
"""


def _section(title: str, body: str, caption: str) -> str:
    note = f'<p class="caption">{html.escape(caption)}</p>' if caption else ""
    return f"<section><h2>{html.escape(title)}</h2>{body}{note}</section>\n"


def _plot(figure: go.Figure, name: str) -> str:
    # a double click that resets would go back to the range of the split that the figure opened with
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False, "doubleClick": "autosize"}
    body = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
    return f'<div class="plot" style="height:{figure.layout.height}px">{body}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    wide = [max((len(row[i]) for row in rows), default=0) > 24 for i in range(len(header))]
    sides = [f' class="left{" wide" if is_wide else ""}"' if name in left else ""
             for name, is_wide in zip(header, wide)]
    head = "".join(f"<th{side}>{html.escape(name)}</th>" for side, name in zip(sides, header))
    lines = ["".join(f"<td{side}>{html.escape(cell)}</td>" for side, cell in zip(sides, row)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _meta(frame: pd.DataFrame, record: StudyRecord) -> str:
    trials = frame.dropna(subset=["trial"]).drop_duplicates("trial")["status"].value_counts()
    counts = ", ".join(f"{count} {status}" for status, count in trials.items())
    return " · ".join([record.provenance.created_at[:10], setting(frame, "device"),
                       f"trials: {counts}" if len(trials) else "no trial yet", f"{record.study.model.path}"])


def _cards(frame: pd.DataFrame) -> str:
    """The four numbers to remember."""
    split = frontier_split(frame)
    front = frontier(frame)
    front = front[front["status"] != "dense"]
    hypervolume = relative_hypervolume(frame)
    rounds = frame[(frame["status"] != "dense") & ~frame["is_alias"]]  # the dense control's too
    computed = float(rounds["seconds"].sum())
    cards = [(str(len(pruned(frame))), "candidates"), (str(len(front)), f"on the frontier ({split} split)"),
             ("-" if math.isnan(hypervolume) else f"{hypervolume:.3f}", "hypervolume, relative to dense"),
             (f"{computed / 60:.1f} min" if computed < 7200 else f"{computed / 3600:.1f} h", "computing, all rounds")]
    return '<div class="cards">' + "".join(
        f'<div class="card"><b>{html.escape(number)}</b><span>{html.escape(name)}</span></div>'
        for number, name in cards) + "</div>"


def _frontier_caption(frame: pd.DataFrame) -> str:
    """Which candidates are in the picture of which split, and why the two must not be compared."""
    made = pruned(frame)
    num_scored = {split: int(quality(made, split).notna().sum()) for split in ("selection", "report")}
    in_amber = ("" if control(frame) is None else " In amber: the dense control, which has the longest trial's fine-tuning and "
                "is not pruned. What it gains on the baseline, candidates owe to training and not to pruning.")
    colours = ("Blue: candidates that no other one beats in both size and quality. Grey: beaten by another one. Dotted line: "
               f"the dense baseline.{in_amber} Bars and bands: one standard error; candidates share their items, so the error "
               "of a difference between two is usually smaller than the bars suggest.")
    if frontier_split(frame) == "report":
        splits = (f"The report split, which the search never saw, was scored for the {num_scored['report']} of {len(made)} "
                  "candidates that the search chose; choose from these. The button “selection split” shows the "
                  f"{num_scored['selection']} candidates scored there, with that split's own dense baseline and frontier. The "
                  "search chose by those values, so they flatter what it chose. Each split holds other items: a value of one "
                  "says nothing beside a value of the other.")
    else:
        splits = (f"Nothing has been scored on the report split yet, so this shows the {num_scored['selection']} of "
                  f"{len(made)} candidates scored on the selection split. The search chooses by these values, so they "
                  "flatter what it chose: expect the report split to be a little worse. Run the sweep to its end.")
    num_raced = int(made["dominated_by"].notna().sum())
    raced = f" {num_raced} whose scoring a race stopped early are in neither picture." if num_raced else ""
    return f"{colours} {splits}{raced}"


def _frontier_table(frame: pd.DataFrame) -> str:
    split, front = frontier_split(frame), frontier(frame)
    if front.empty:
        return "<p>No candidate yet.</p>"
    front = front.assign(front_probability=front_probability(frame, split))
    objective = setting(frame, "objective")
    others = [name for name in metric_names(front, split) if name != objective]  # last: a screen seldom holds them all
    header = ["trial", "round", objective.replace("/", "/ "), "P(front)", "stored", "sparsity", "how it was pruned", "non-zero",
              "of model", "resident", *(name.replace("/", "/ ") for name in others)]  # what a choice needs stands first
    baseline = candidates(frame)[lambda rows: (rows["status"] == "dense") & ~rows["key"].isin(front["key"])]
    pool = pd.concat([front, baseline, control_rows(frame)])
    rows = []
    for _, row in pool.iterrows():
        score, *scores = [with_stderr(*metric_pair(row, name, split)) for name in (objective, *others)]
        rows.append(["-" if pd.isna(row["trial"]) else str(row["trial"]), str(row["round"]), score,
                     "-" if pd.isna(row["front_probability"]) else f"{row['front_probability']:.2f}",
                     human_bytes(row["stored_bytes"]), f"{row['sparsity']:.3f}", describe_config(row),
                     human_count(row["num_nonzero"]), f"{row['model_sparsity']:.3f}", human_bytes(row["resident_bytes"]),
                     *scores])
    return _table(header, rows, left=("how it was pruned",))


def _optimism_table(frame: pd.DataFrame) -> tuple[str, str]:
    rows = optimism(frame)
    if rows.empty:
        return "<p>No candidate was scored on both splits yet.</p>", ""
    objective = setting(frame, "objective")
    cells = [[str(row["trial"]), str(row["round"]), f"{row['sparsity']:.3f}", f"{row['selection_loss']:+.4f}",
              f"{row['report_loss']:+.4f}", f"{row['optimism']:+.4f} ± {row['optimism_stderr']:.4f}"]
             for _, row in rows.iterrows()]
    mean = rows["optimism"].mean()
    return (_table(["trial", "round", "sparsity", "loss on selection", "loss on report", "optimism"], cells),
            f"Candidates on the frontier of the selection split: loss of {objective} against the dense baseline of the "
            f"same split (positive is worse). The mean optimism is {mean:+.4f}; above 0 the selection split made the "
            "chosen candidates look better than they are.")


def _importance(frame: pd.DataFrame) -> tuple[str, str]:
    try:
        table = importance(frame)
    except ValueError as error:
        return f"<p>Not shown: {html.escape(str(error))}.</p>", ""
    pool = pruned(frame)
    return _plot(importance_figure(table, frame), "importance"), (
        f"From {len(pool)} candidates of {pool['trial'].nunique()} trials, selection split: the objective is ranked, a "
        "cubic in the rank of the size is taken out, and a bar is the share of the remaining variance that the levels "
        "of one hyper-parameter explain (adjusted eta squared). Grey bars do not exceed what reshuffled trials give in "
        "95 % of cases (the tick). Hyper-parameters that vary together share their credit; this is association in the "
        "trials that were run, not cause.")


def _ends(frame: pd.DataFrame) -> tuple[str, str]:
    of_control = (frame["status"] == "control") & frame["reason"].notna()
    rows = frame[frame["status"].isin(["failed", "stopped"]) | of_control]
    if rows.empty:
        return "<p>None.</p>", ""
    cells = []
    for _, path in rows.groupby(["trial", "reason"], dropna=False):  # controls have no number
        row = path.iloc[0]
        cells.append(["-" if pd.isna(row["trial"]) else str(row["trial"]), str(row["status"]),
                      str(int(path["round"].notna().sum())), describe_config(row),
                      "not recorded" if pd.isna(row["reason"]) else str(row["reason"])])
    return (_table(["trial", "status", "rounds", "how it was pruned", "reason"], cells,
                   left=("status", "how it was pruned", "reason")),
            "The rounds that such a trial finished are candidates like any other. Tracebacks and log paths are in "
            "trials/NUMBER.json of the study directory.")


def _method(frame: pd.DataFrame, record: StudyRecord) -> str:
    study, trains = record.study, bool(frame["trained_tokens"].fillna(0).gt(0).any())
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record.provenance.versions.items()))
    rows: list[tuple[str, str]] = [
        ("non-zero parameters", "parameters of the whole model that are not zero; tied weights count once. Sparsity is "
         "the share of zeros among the prunable weights, “of model” among all parameters."),
        ("stored bytes", "tensor bytes of the compressed export: a bitmap and the non-zero values where that is "
         "smaller, dense otherwise."),
        ("resident bytes", "tensor bytes of the dense export, which is what transformers keeps in memory when it "
         "serves the model: unstructured zeros do not lower it."),
        ("selection split", f"what the search saw and optimised ({study.search.objective})."),
        ("report split", "other documents, scored only for the candidates that the search chose, and for the dense "
         "baseline."),
        ("standard error", "over the items of a task, as lm-eval gives it; it does not cover the luck of the training "
         "seed."),
        ("dense control", "the dense model after the longest trial's rounds of fine-tuning, with that trial's learning rate, "
         "without pruning and L1: what a candidate gains from training alone. It is the control of a pruned model only at "
         "that learning rate; another one may suit the dense model better or worse." if study.search.dense_control and trains
         else "off (dense_control): part of what a candidate gains is its fine-tuning." if trains
         else "none, since nothing was fine-tuned."),
        ("not measured", "latency and throughput: fewer non-zero parameters do not by themselves make a model faster."),
        ("model", study.model.path), ("corpus", study.data.corpus or "none"), ("tasks", ", ".join(study.evaluation.tasks)),
        ("prunable", study.model.prunable), ("precision, ranks", f"{study.model.dtype}, ZeRO "
         f"{study.cluster.zero_stage}, {study.cluster.num_ranks} rank(s), seed {study.data.seed}"),
        ("hardware", setting(frame, "device")), ("host", record.provenance.hostname),
        ("made", record.provenance.created_at), ("git commit", record.provenance.git_commit or "not recorded"),
        ("versions", versions), ("study directory", setting(frame, "directory")),
    ]
    body = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in rows)
    return f"<dl>{body}</dl>"


_STYLE = """
:root { --ink: #1f2937; --muted: #6b7280; --line: #e5e7eb; --blue: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); line-height: 1.5;
  font: 15px/1.5 Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 64px; }
.kicker { margin: 0; color: var(--blue); font-size: 12px; font-weight: 600; letter-spacing: .08em;
  text-transform: uppercase; }
h1 { margin: 2px 0 4px; font-size: 28px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 18px; }
.meta { margin: 0 0 20px; color: var(--muted); overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; }
.card, section, .headlines { background: white; border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 16px; }
.card b { display: block; font-size: 24px; line-height: 1.2; }
.card span { color: var(--muted); font-size: 13px; }
.headlines { margin: 12px 0; padding: 14px 16px 14px 34px; border-left: 4px solid var(--blue); }
.headlines li { margin: 3px 0; }
section { margin: 16px 0; padding: 20px; }
.caption { margin: 12px 0 0; color: var(--muted); font-size: 13px; max-width: 90ch; }
.plot { width: 100%; }
.scroll { overflow: auto; max-height: 620px; }
h2 + .scroll table { min-width: 560px; }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--line); vertical-align: bottom;
  position: sticky; top: 0; background: white; }
td { border-bottom: 1px solid #f1f2f4; white-space: nowrap; }
th, td { padding: 6px 7px; text-align: right; }
th.left, td.left { text-align: left; }
td.wide { white-space: normal; min-width: 210px; overflow-wrap: anywhere; }
tbody tr:hover td { background: #f8fafc; }
dl { display: grid; grid-template-columns: 160px 1fr; gap: 6px 16px; margin: 0; font-size: 14px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 20px 10px 40px; }
  h1 { font-size: 22px; }
  section { padding: 14px 12px; }
  .cards { grid-template-columns: repeat(2, 1fr); }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 10px; }
}
"""
