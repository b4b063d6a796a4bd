"""`raysearch demo`: pretrain, sweep, report, pick and export, with no arguments, on this machine."""

import time
from collections.abc import Callable
from pathlib import Path

from analysis.constraints import parse_constraints
from analysis.load import load
from analysis.page import write_page
from analysis.pick import describe_pick, pick, write_pick
from analysis.tables import results_table
from raysearch.cluster.joining import start_ray
from raysearch.deploy.export import export
from raysearch.search.space import load_space
from raysearch.search.sweep import sweep
from raysearch.study.ledger import Ledger
from raysearch.training.pretrain import pretrain

SPACE = "search_spaces.demo"
MAX_DROP = "text/bits_per_byte=0.25"


def run_demo(out: Path, echo: Callable[[str], None]) -> None:
    """Writes model/, study/, pick.json and deploy/ into `out`; a second run resumes and finds everything done."""
    started = time.monotonic()
    study, space = load_space(SPACE)
    study = study.replaced(path=str(out / "model"))
    start_ray(study)
    echo(f"1/4 pretrain a tiny GPT on the documentation of Python: {study.model.path}")
    pretrain("tiny", "builtin", out / "model", echo=echo)
    echo(f"2/4 sweep: {study.search.num_trials} trials, {study.search.max_concurrent} at a time")
    result = sweep(SPACE, out / "study", study, space, echo)
    if result.interrupted:
        raise KeyboardInterrupt
    echo("3/4 frontier")
    frame = load(result.directory)
    report = write_page(result.directory)
    echo("4/4 pick and export\n")
    picked = pick(frame, parse_constraints(max_drop=[MAX_DROP]))
    pick_file = write_pick(picked, out / "pick.json")
    deployed = export(Ledger.open(result.directory), picked.key, out / "deploy", echo=echo)
    echo(results_table(frame, frontier_only=True))
    echo(describe_pick(picked))
    echo(f"\n{result.num_candidates} candidates in {time.monotonic() - started:.0f} s\n"
         f"report             {report}\n"
         f"pick               {pick_file}\n"
         f"deployment folder  {deployed}\n\n"
         f"next: open the report, then\n"
         f"  raysearch results {out / 'study'} --format csv\n"
         f"  raysearch sweep {SPACE} --out {out / 'study'} --trials {2 * study.search.num_trials}\n"
         "  and write a search space for your own model: search_spaces/demo.py is 40 lines")
