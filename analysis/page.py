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
    dense,
    frontier,
    frontier_split,
    quality,
    quality_stderr,
    relative_hypervolume,
    setting,
)
from analysis.importance import importance
from analysis.load import load, metric_names
from analysis.plots import SIZE_NAMES, frontier_figure, importance_figure, trajectory_figure
from analysis.tables import describe_config, with_stderr
from raysearch.config import higher_is_better
from raysearch.study.files import new_file
from raysearch.study.ledger import Ledger
from raysearch.study.records import StudyRecord
from raysearch.study.storage import AnyPath, location
from raysearch.units import human_bytes, human_count


def write_page(directory: str | AnyPath, out: str | AnyPath | None = None) -> AnyPath:
    """Writes `out` (default: report.html in the study directory) and returns its absolute path.

    Works at any moment of a study, with no candidate too. ValueError when there is no study or `out` is a folder."""
    frame = load(directory)
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
    pool = candidates(frame)
    pruned = pool[(pool["status"] != "dense") & quality(pool, split).notna()]
    if baseline is None or pruned.empty or pd.isna(baseline[f"{split}/{setting(frame, 'objective')}"]):
        return ["No candidate can be compared with the dense baseline yet."]
    goals = quality(pool, split)[pool["status"] == "dense"].iloc[0]
    dense_stderr = quality_stderr(pool, split)[pool["status"] == "dense"].fillna(0).iloc[0]
    loss = goals - quality(pruned, split)  # positive when worse than dense
    noise = (quality_stderr(pruned, split).fillna(0) ** 2 + dense_stderr**2) ** 0.5
    up = higher_is_better(setting(frame, "objective"))
    limit, words = (0.01, "1 point") if up else (0.01 * abs(goals), "1 %")
    sentences = [_smallest(frame, pruned[loss <= noise], "one standard error", split),
                 _smallest(frame, pruned[loss <= limit], words, split)]
    front = frontier(frame)
    num_front = int((front["status"] != "dense").sum())
    sentences.append(f"{num_front} of {len(pruned)} candidates scored on the {split} split are on the frontier, from "
                     f"sparsity {front['sparsity'].min():.2f} to {front['sparsity'].max():.2f}; {len(pool) - 1} candidates "
                     f"were made in all. Hypervolume {relative_hypervolume(frame):.3f} (relative to dense in size, by "
                     f"{SIZE_NAMES[size]}, and in quality; half the size at equal quality alone gives 0.5).")
    if (loss < -noise).any():
        sentences.append(f"Better than the dense baseline by more than one standard error: {int((loss < -noise).sum())}. "
                         "Fine-tuning trained them further than the baseline, so this says that the baseline was not trained "
                         "to its end, not that pruning helps.")
    return sentences


def optimism(frame: pd.DataFrame) -> pd.DataFrame:
    """Selection against report, for the candidates that the search chose (the frontier of the selection split, where
    scored on both): `selection_loss` and `report_loss` are the losses against the dense baseline on each split, in
    the objective's unit, positive when worse; `optimism` = report_loss - selection_loss, above 0 when the selection
    split flattered the choice; `optimism_stderr` as if the splits' errors were independent."""
    rows = frontier(frame, "selection")
    rows = rows[(rows["status"] != "dense") & quality(rows, "report").notna()]
    baseline = frame[frame["status"] == "dense"]
    if baseline.empty or rows.empty:
        return rows.assign(selection_loss=[], report_loss=[], optimism=[], optimism_stderr=[]).head(0)
    variance = pd.Series(0.0, index=rows.index)
    for split in ("selection", "report"):
        rows = rows.assign(**{f"{split}_loss": quality(baseline, split).iloc[0] - quality(rows, split)})
        variance += (quality_stderr(rows, split).fillna(0) ** 2
                     + quality_stderr(baseline, split).fillna(0).iloc[0] ** 2)
    return rows.assign(optimism=rows["report_loss"] - rows["selection_loss"], optimism_stderr=variance**0.5)


def _smallest(frame: pd.DataFrame, good: pd.DataFrame, words: str, split: str) -> str:
    if good.empty:
        return f"No candidate is within {words} of the dense baseline."
    size, objective = setting(frame, "size"), setting(frame, "objective")
    best = good.assign(minus=-quality(good, split)).sort_values([size, "minus", "key"]).iloc[0]
    baseline = frame[frame["status"] == "dense"].iloc[0]
    value, reference = (with_stderr(*(float(row[f"{split}/{objective}{end}"]) for end in ("", "_stderr")))
                        for row in (best, baseline))
    share, stored_share = (best[name] / baseline[name] for name in ("num_nonzero", "stored_bytes"))
    return (f"Smallest within {words} of dense: sparsity {best['sparsity']:.2f} (trial {best['trial']} round "
            f"{best['round']}), {human_count(best['num_nonzero'])} non-zero parameters ({share:.0%} of dense), "
            f"{human_bytes(best['stored_bytes'])} stored ({stored_share:.0%}), {objective} {value}, "
            f"dense {reference}.")


def _page(frame: pd.DataFrame, record: StudyRecord) -> str:
    """The whole page; every string that is not ours goes through html.escape."""
    title = f"{PurePath(record.study.model.path).name}: {record.space}"
    points = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in headlines(frame))
    sections = [
        _section("Frontier", _plot(frontier_figure(frame), "frontier"), _frontier_caption(frame)),
        _section("Candidates on the frontier", _frontier_table(frame), "Smallest first. P(front) is the share of 1,000 "
                 "random redraws of all scores, each by its standard error, in which the candidate is on the "
                 "frontier: near 1 it is there beyond noise, near 0.5 it cannot be told from a neighbour. The redraws "
                 "are independent although candidates share their items, so it errs towards doubt."),
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
    split, pool = frontier_split(frame), candidates(frame)
    front = frontier(frame)
    front = front[front["status"] != "dense"]
    hypervolume = relative_hypervolume(frame)
    pruned = pool[pool["status"] != "dense"]
    computed = float(pruned["seconds"].sum())
    cards = [(str(len(pruned)), "candidates"), (str(len(front)), f"on the frontier ({split} split)"),
             ("-" if math.isnan(hypervolume) else f"{hypervolume:.3f}", "hypervolume, relative to dense"),
             (f"{computed / 60:.1f} min" if computed < 7200 else f"{computed / 3600:.1f} h", "computing, all rounds")]
    return '<div class="cards">' + "".join(
        f'<div class="card"><b>{html.escape(number)}</b><span>{html.escape(name)}</span></div>'
        for number, name in cards) + "</div>"


def _frontier_caption(frame: pd.DataFrame) -> str:
    """Which candidates are in the picture of which split, and why the two must not be compared."""
    pool = candidates(frame)
    pruned = pool[pool["status"] != "dense"]
    num_scored = {split: int(quality(pruned, split).notna().sum()) for split in ("selection", "report")}
    colours = ("Blue: candidates that no other one beats in both size and quality. Grey: beaten by another one. Dotted line: "
               "the dense baseline. Bars and band: one standard error; candidates share their items, so the error of a "
               "difference between two is usually smaller than the bars suggest.")
    if frontier_split(frame) == "report":
        splits = (f"The report split, which the search never saw, was scored for the {num_scored['report']} of {len(pruned)} "
                  "candidates that the search chose; choose from these. The button “selection split” shows the "
                  f"{num_scored['selection']} candidates scored there, with that split's own dense baseline and frontier. The "
                  "search chose by those values, so they flatter what it chose. Each split holds other items: a value of one "
                  "says nothing beside a value of the other.")
    else:
        splits = (f"Nothing has been scored on the report split yet, so this shows the {num_scored['selection']} of "
                  f"{len(pruned)} candidates scored on the selection split. The search chooses by these values, so they "
                  "flatter what it chose: expect the report split to be a little worse. Run the sweep to its end.")
    num_raced = int(pruned["dominated_by"].notna().sum())
    raced = f" {num_raced} whose scoring a race stopped early are in neither picture." if num_raced else ""
    return f"{colours} {splits}{raced}"


def _frontier_table(frame: pd.DataFrame) -> str:
    split, front = frontier_split(frame), frontier(frame)
    if front.empty:
        return "<p>No candidate yet.</p>"
    objective = setting(frame, "objective")
    others = [name for name in metric_names(front, split) if name != objective]  # last: a screen seldom holds them all
    header = ["trial", "round", "sparsity", "of model", "non-zero", "stored", "resident", objective.replace("/", "/ "),
              "P(front)", "how it was pruned", *(name.replace("/", "/ ") for name in others)]
    pool = pd.concat([front, candidates(frame)[lambda rows: (rows["status"] == "dense")
                                               & ~rows["key"].isin(front["key"])]])
    rows = []
    for _, row in pool.iterrows():
        score, *scores = [with_stderr(*(float(row[f"{split}/{name}{end}"]) for end in ("", "_stderr")))
                          for name in (objective, *others)]
        rows.append(["-" if pd.isna(row["trial"]) else str(row["trial"]), str(row["round"]), f"{row['sparsity']:.3f}",
                     f"{row['model_sparsity']:.3f}", human_count(row["num_nonzero"]), human_bytes(row["stored_bytes"]),
                     human_bytes(row["resident_bytes"]), score,
                     "-" if pd.isna(row["front_probability"]) else f"{row['front_probability']:.2f}",
                     describe_config(row), *scores])
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
    pool = candidates(frame)
    pool = pool[pool["status"] != "dense"]
    return _plot(importance_figure(table, frame), "importance"), (
        f"From {len(pool)} candidates of {pool['trial'].nunique()} trials, selection split: the objective is ranked, a "
        "cubic in the rank of the size is taken out, and a bar is the share of the remaining variance that the levels "
        "of one hyper-parameter explain (adjusted eta squared). Grey bars do not exceed what reshuffled trials give in "
        "95 % of cases (the tick). Hyper-parameters that vary together share their credit; this is association in the "
        "trials that were run, not cause.")


def _ends(frame: pd.DataFrame) -> tuple[str, str]:
    rows = frame[frame["status"].isin(["failed", "stopped"])]
    if rows.empty:
        return "<p>None.</p>", ""
    cells = []
    for number, path in rows.groupby("trial"):
        row = path.iloc[0]
        cells.append([str(number), str(row["status"]), str(int(path["round"].notna().sum())), describe_config(row),
                      "not recorded" if pd.isna(row["reason"]) else str(row["reason"])])
    return (_table(["trial", "status", "rounds", "how it was pruned", "reason"], cells,
                   left=("status", "how it was pruned", "reason")),
            "The rounds that such a trial finished are candidates like any other. Tracebacks and log paths are in "
            "trials/NUMBER.json of the study directory.")


def _method(frame: pd.DataFrame, record: StudyRecord) -> str:
    study = record.study
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
