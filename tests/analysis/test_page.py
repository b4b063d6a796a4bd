import base64
import gzip
import os
import re
import shlex
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import plotly.offline
import pytest
from browser import browsing
from commands import Run
from synthetic_study import SyntheticStudy, metrics

from analysis.constraints import parse_constraints
from analysis.load import load
from analysis.page import watch_page, write_page
from analysis.parallel import parallel_coordinates
from analysis.pick import describe_pick, pick
from raysearch.config import Action
from raysearch.study.records import TrialRecord


class Page(HTMLParser):
    """Text outside scripts and styles, opened tags, and addresses that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden = tag in ("script", "style")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data-src")]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = self._hidden and tag not in ("script", "style")

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else " ".join(["", *data.split(), ""])


def test_one_file_that_loads_nothing(study_directory: Path, tmp_path: Path) -> None:
    path = write_page(study_directory, tmp_path / "new" / "r.html")
    page = Page(path.read_text())
    assert path == tmp_path / "new" / "r.html"
    assert page.addresses == ["data:,"]
    (packed,) = re.findall(r'id="plotly">([^<]*)<', path.read_text())
    assert gzip.decompress(base64.b64decode(packed)).decode() == plotly.offline.get_plotlyjs()
    assert page.tags.count("script") == 3  # plotly.js, the data, ours
    assert 1.5e6 < path.stat().st_size < 2.5e6
    assert [file.name for file in path.parent.iterdir()] == ["r.html"]


def test_what_it_says(study_directory: Path, tmp_path: Path) -> None:
    text = Page(write_page(study_directory, tmp_path / "r.html").read_text()).text
    for words in ("tiny-gpt: spaces.demo", "CPU, 2 cores", "trials: 7 done, 2 stopped, 2 failed, 1 running",
                  "worker died: out of memory", "0123456789abcdef", "torch 2.13.0", "not measured: fewer", "2.352 ± 0.020",
                  "cubic to 0.7 in 3, global, 3 ep, lr 0.0003, l1 0.0001", "time budget is spent"):
        assert words in text, words


def test_the_caption_counts_the_candidates_of_each_split(study_directory: Path, tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.2, 0.5], report=True)
    (raced,) = study.trial(1, [0.4])
    record = study.ledger.candidate(raced)
    (study.ledger.round_directory(raced) / "record.json").write_text(
        record.model_copy(update={"dominated_by": "rival"}).model_dump_json())
    for directory, phrases in (
            (study_directory, ("was scored for the 12 of 19 candidates", "The 19 candidates scored on the selection")),
            (tmp_path / "study", ("was scored for the 2 of 3 candidates", "The 2 candidates scored on the selection",
                                  "1 whose scoring a race stopped early are in neither picture"))):
        text = Page(write_page(directory, tmp_path / "r.html").read_text()).text
        for phrase in phrases:
            assert phrase in text, phrase
    assert "a race stopped" not in Page(write_page(study_directory, tmp_path / "r.html").read_text()).text


def test_everything_foreign_is_escaped(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.5], report=True, status="failed", reason="</script><script>alert('x')</script><blink>")
    text = write_page(tmp_path / "study").read_text()
    assert "alert('x')" in Page(text).text
    assert not re.search(r"<script>alert", text)
    page = Page(text)
    assert page.tags.count("script") == 3
    assert "blink" not in page.tags


def test_the_page_shows_the_control(controlled_directory: Path, tmp_path: Path) -> None:
    text = Page(write_page(controlled_directory, tmp_path / "r.html").read_text()).text
    for words in ("In amber: the dense control", "1.935 ± 0.020", "without pruning and L1",
                  "trials: 7 done, 2 stopped, 2 failed"):
        assert words in text, words
    study = SyntheticStudy(tmp_path / "study", dense_control=True)
    study.dense()
    study.trial(0, [0.5], finetune_epochs=1.0)
    study.control(report=False, num_finished=0, status="failed", reason="round 1: diverged")
    text = Page(write_page(tmp_path / "study").read_text()).text
    assert re.search(r"dense control\s+round 1: diverged", text)
    assert "In amber" not in text


def test_any_moment_of_a_study(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    assert "no trial yet" in Page(write_page(tmp_path / "study").read_text()).text
    study.dense(report=False)
    study.trial(0, [0.5], status="failed", num_finished=0, reason="diverged")
    text = Page(write_page(tmp_path / "study").read_text()).text
    assert "No candidate can be compared with the dense baseline yet." in text
    assert "Not shown: importance needs at least 8 candidates of 4 trials, got 0 of 0." in text
    study.trial(1, [0.2, 0.4])
    text = Page(write_page(tmp_path / "study").read_text()).text
    assert "Nothing has been scored on the report split yet, so this shows the 2 of 2 candidates scored on the" in text
    study.dense()
    study.trial(2, [0.3], report=True)
    assert "1 of 1 candidates scored on the report split" in Page(write_page(tmp_path / "study").read_text()).text


def test_a_page_follows_a_study_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.page.WATCH_S", 0.2)
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    page = tmp_path / "study" / "report.html"
    with study.ledger.lock():
        watching = threading.Thread(target=watch_page, args=(tmp_path / "study",))
        watching.start()
        while not page.exists() or 'http-equiv="refresh" content="0.2"' not in page.read_text():
            time.sleep(0.05)
        study.trial(0, [0.5], report=True)
        assert watching.is_alive()
    watching.join(20)
    assert not watching.is_alive()
    assert 'http-equiv="refresh"' not in page.read_text()
    assert "1 of 1 candidates scored on the report split" in page.read_text()


def test_a_folder_is_not_a_page(study_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the page must be a file, got the folder"):
        write_page(study_directory, tmp_path)


def test_the_answer_is_first(study_directory: Path, tmp_path: Path) -> None:
    def first_screen(*max_drop: str) -> str:
        text = Page(write_page(study_directory, tmp_path / "r.html", max_drop=max_drop).read_text()).text
        return " ".join(text[text.index("The answer"):text.index("Candidates on the frontier")].split())

    screen = first_screen("text/bits_per_byte=0.15@95%")
    picked = pick(load(study_directory), parse_constraints(max_drop=["text/bits_per_byte=0.15@95%"]))
    assert f"Trial {picked.trial} round {picked.round} is the smallest candidate within --max-drop" in screen
    assert f"at most {picked.checks[0].bound:.3g}" in screen
    for words in ("680k", "68% of dense", "last_word/acc", "last_word/perplexity", "95 % interval",
                  f"raysearch pick {study_directory} --max-drop text/bits_per_byte=0.15@95%", "raysearch export pick.json"):
        assert words in screen, words
    assert "the smallest candidate within --max-drop text/bits_per_byte=0.0201@95% (1 % of dense)" in first_screen()
    assert "no candidate is certain" in first_screen("text/bits_per_byte=-1@95%")


def test_a_constant_objective_has_no_importance(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    for number, rate in enumerate((1e-4, 2e-4, 3e-4, 4e-4)):
        study.trial(number, [0.3, 0.5], learning_rate=rate, finetune_epochs=1.0)
    for record in (tmp_path / "study" / "rounds").glob("*/record.json"):
        record.write_text(re.sub(r'("text/bits_per_byte":\s*{"value":)[\d.]+', r"\g<1>2.0", record.read_text()))
    text = write_page(tmp_path / "study").read_text()
    assert "Not shown: importance needs candidates whose quality differs at equal size, got none that do." in text
    assert 'id="importance"' not in text


EDGES = """[...document.querySelectorAll("main *")].filter((node) => {
  const box = node.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !node.closest(".js-plotly-plot");
}).map((node) => node.outerHTML.slice(0, 80))"""
PLOTS = """[...document.querySelectorAll(".js-plotly-plot")].map((plot) => plot.querySelectorAll(".point").length)"""


def test_in_a_browser(study_directory: Path, tmp_path: Path, run: Run) -> None:
    page = write_page(study_directory, tmp_path / "r.html")
    with browsing() as browser:
        for width in (390, 1400):
            browser.open(page, width)
            browser.run("drawn")
            assert all(number > 0 for number in browser.run(PLOTS)[:3])
            assert browser.run("document.documentElement.scrollWidth") == width
            assert browser.run(EDGES) == []
        assert browser.run('[...document.querySelectorAll(".scroll")].every((one) => one.scrollWidth <= one.clientWidth)')
        ticks = '[...document.querySelectorAll("#frontier .xtick")].map((tick) => tick.textContent)'
        before = browser.run(ticks)
        browser.run('document.querySelector(\'[data-for="frontier"] button:nth-child(2)\').click()')
        assert browser.run('document.querySelector("#frontier .xtitle").textContent') == "stored bytes (smaller is better)"
        assert browser.run(ticks) != before
        x, y = browser.run("""(() => { scrollTo(0, 500); const point = document.querySelectorAll("#frontier .point")[2];
          const box = point.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()""")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        browser.run("new Promise((done) => setTimeout(done, 300))")
        assert "sparsity" in browser.run('document.querySelector("#frontier .hoverlayer").textContent')
        by_click = browser.run('[...document.querySelectorAll("#chosen code")].map((code) => code.textContent)')
        browser.run('document.querySelector(\'[data-candidate="2/1"]\').click()')
        chosen, again = browser.run('[...document.querySelectorAll("#chosen code")].map((code) => code.textContent)')
        assert browser.errors == []
        assert {urlsplit(address).scheme for address in browser.requests} <= {"file", "data"}
    assert again.startswith("raysearch prune /models/tiny-gpt --corpus builtin ")
    assert again.endswith(" --sparsity 0.6 --rounds 1 --finetune-epochs 2.0 --out again")
    for command in (by_click[0], chosen):
        assert command.startswith(f"raysearch pick {study_directory} --candidate ")
        code, out, err = run(*shlex.split(command)[1:], "--out", tmp_path / "pick.json")
        assert (code, err) == (0, ""), err
    assert out.startswith("picked trial 2 round 1 ")


PINK = """(x, y) => {
  const canvas = document.querySelector("#parallel canvas"), scale = canvas.width / canvas.clientWidth;
  const [red, green, blue] = canvas.getContext("2d").getImageData(x * scale, y * scale, 1, 1).data;
  return red > 150 && green < 90 && blue > 60 && blue < 160; }"""
DRAWN = "new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))"


def pressed(key: str) -> str:
    return f'document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {{key: "{key}", bubbles: true}}))'


def test_lines_and_points_are_linked(study_directory: Path, tmp_path: Path) -> None:
    drawn = parallel_coordinates(load(study_directory))
    assert drawn is not None
    names = [(drawn["trials"][trial], depth) for trial, depth in drawn["candidates"]]
    index, axes = names.index((3, 1)), drawn["axes"]
    with browsing() as browser:
        browser.open(write_page(study_directory, tmp_path / "r.html"), 1400)
        browser.run("drawn")
        width = browser.run('document.getElementById("parallel").clientWidth')
        x, y = 14 + (width - 28) * axes[-1]["at"][index] / 1000, 32 + 58 * (len(axes) - 1)
        ring = """document.getElementById("frontier").layout.shapes.filter(({name}) => name == "chosen").map(
          ({xanchor}) => xanchor)"""

        browser.run('document.querySelector(\'[data-candidate="3/1"]\').click()')  # a point of the frontier shows its line
        browser.run(DRAWN)
        assert browser.run(f"({PINK})({x}, {y - 2})")
        assert browser.run(ring) == [760_000]
        browser.run('document.querySelector(\'[data-for="frontier"] button:nth-child(2)\').click()')
        browser.run(DRAWN)
        assert browser.run(ring) == [3_140_000]

        other = names.index((5, 3))  # a line shows its point
        x = 14 + (width - 28) * (axes[-2]["at"][other] + axes[-1]["at"][other]) / 2000
        left, top = browser.run("""(() => { const canvas = document.querySelector("#parallel canvas");
          canvas.scrollIntoView({block: "center"}); const box = canvas.getBoundingClientRect(); return [box.x, box.y]; })()""")
        for kind in ("mousePressed", "mouseReleased"):
            browser.call("Input.dispatchMouseEvent", type=kind, x=left + x, y=top + y - 29, button="left", clickCount=1)
        browser.run(DRAWN)
        assert browser.run('document.querySelectorAll(".chosen p:first-child")[1].textContent') == "Trial 5, round 3"
        assert browser.run(ring) == [1_591_200]

        rate = [axis["name"] for axis in axes].index("rate")  # a brush filters: trial 5 alone has a rate
        middle = 14 + (width - 28) * axes[rate]["at"][5] / 1000
        for kind, to in (("mousePressed", -60), ("mouseMoved", 60), ("mouseReleased", 60)):
            browser.call("Input.dispatchMouseEvent", type=kind, x=left + middle + to, y=top + 32 + 58 * rate, button="left",
                         clickCount=1, buttons=1)
        browser.run(DRAWN)
        assert browser.run('document.querySelector(".passing output").textContent') == "3 of 19 candidates pass."
        kept = browser.run('document.getElementById("selection").data[0].selectedpoints')
        assert [names[at] for at in kept] == [(5, 1), (5, 2), (5, 3)]
        browser.run('document.querySelector("#parallel canvas").focus()')  # with the keyboard only what passes is chosen
        for key, depth in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 3)):
            browser.run(pressed(key))
            assert browser.run('document.querySelector("#chosen p").textContent') == f"Trial 5, round {depth}"
        browser.run('document.querySelector(".passing button").click()')
        assert browser.run('document.querySelector(".passing output").textContent') == "19 candidates."
        assert browser.run('document.getElementById("selection").data[0].selectedpoints ?? null') is None

        browser.run(f'document.querySelectorAll(".axis")[{len(axes) - 2}].focus()')
        for key in ("ArrowRight", "ArrowUp", "ArrowRight"):
            browser.run(pressed(key))
        said = "[...document.querySelectorAll('.axis')].at(-2).getAttribute('aria-valuetext')"
        passing = sum(50 <= at <= 350 for at in axes[-2]["at"])
        assert browser.run('document.querySelector(".passing output").textContent') == f"{passing} of 19 candidates pass."
        assert re.fullmatch(r"about \d+k to \d+k", browser.run(said))
        browser.run(pressed("Escape"))
        assert browser.run(said) == "all"
        assert browser.errors == []


def test_a_page_that_is_read_again_stays_as_it_was_left(study_directory: Path, tmp_path: Path) -> None:
    page = write_page(study_directory, tmp_path / "r.html", again_s=600)
    state = """({said: document.querySelector("#chosen p").textContent, scrolled: scrollY,
      pressed: document.querySelector('[data-for="frontier"] [aria-pressed="true"]').textContent,
      rings: document.getElementById("frontier").layout.shapes.filter(({name}) => name === "chosen").length,
      range: document.getElementById("trajectories")._fullLayout.xaxis.range.map(Math.round),
      passing: document.querySelector(".passing output").textContent, focus: document.activeElement.ariaLabel})"""
    with browsing() as browser:
        browser.open(page, 1400)
        browser.run("drawn")
        untouched = browser.run(state)
        browser.run("void setTimeout(readAgain)")
        browser.loaded()
        browser.run("restored")
        assert browser.run(state) == untouched
        browser.run("""(async () => {
          document.querySelector('[data-candidate="3/1"]').click();
          await document.querySelectorAll('[data-for="frontier"] button')[1].onclick();
          await Plotly.relayout("trajectories", {"xaxis.range[0]": 1, "xaxis.range[1]": 3});
          const axis = [...document.querySelectorAll(".axis")].at(-2);
          axis.focus();
          for (const key of ["ArrowRight", "ArrowUp"]) axis.dispatchEvent(new KeyboardEvent("keydown", {key}));
          scrollTo(0, 1234); })()""")
        left = browser.run(state)
        assert all(left[name] != untouched[name] for name in left), left
        browser.run('getSelection().selectAllChildren(document.querySelector("#chosen"))')
        assert browser.run("(() => { readAgain(); return String(getSelection()); })()").startswith("Trial 3, round 1")
        browser.run("getSelection().empty()")
        write_page(study_directory, page)  # the sweep has ended
        browser.run("void setTimeout(readAgain)")
        browser.loaded()
        browser.run("restored")
        assert browser.run(state) == left
        browser.open(write_page(study_directory, page, again_s=0.1))
        browser.loaded()  # by its own clock
        assert browser.errors == []


def test_a_fork_says_from_where_it_goes_on_and_runs_again_by_its_record(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "a study")
    study.dense()
    first = study.trial(0, [0.3], report=True)
    action = Action(sparsity=0.6, scope="layer", criterion="wanda", finetune_tokens=2000, learning_rate=1e-3)
    study.ledger.write_trial(TrialRecord(number=1, config=None, actions=(*study.ledger.trial(0).actions, action), forked_at=1,
                                         started_at=""))
    (*_, key) = study.finish(1)
    study._report(key, metrics(0.6, 0.0))
    page = write_page(tmp_path / "a study", max_drop=["text/bits_per_byte=1@95%"])
    how = "from trial 0 round 1 on: to 0.6, layer, wanda, 2k tokens, lr 0.001"
    assert first[0] != key
    assert f"It was pruned {how}." in Page(page.read_text()).text
    assert f"pruned {how}" in describe_pick(pick(load(tmp_path / "a study"), [], "1/2"))
    with browsing() as browser:
        browser.open(page, 1400)
        browser.run("drawn")
        browser.run('document.querySelector(\'[data-candidate="1/2"]\').click()')
        _, again = browser.run('[...document.querySelectorAll("#chosen code")].map((code) => code.textContent)')
    _, prune, *options = shlex.split(again)
    assert prune == "prune"
    assert options[-4:] == ["--actions", str(study.ledger.trial_path(1)), "--out", "again"]


@pytest.mark.slow
def test_two_thousand_trials_are_a_page_in_seconds(tmp_path: Path) -> None:
    study, generator = SyntheticStudy(tmp_path / "study"), np.random.default_rng(0)
    study.dense()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        for number in range(2000):
            end, rounds, tuning = generator.uniform(0.2, 0.97), int(generator.integers(1, 7)), float(generator.exponential(0.5))
            study.trial(number, [end * (depth + 1) / rounds for depth in range(rounds)], report=number < 20, schedule="linear",
                        finetune_epochs=tuning, learning_rate=float(10 ** generator.uniform(-5, -3)))
    began = time.process_time()
    page = write_page(tmp_path / "study")
    assert page.stat().st_size < 6_000_000
    assert time.process_time() - began < 5.0
