import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import plotly.offline
import pytest
from synthetic_study import SyntheticStudy

from analysis.load import load
from analysis.page import headlines, optimism, write_page


class Page(HTMLParser):
    """Text outside scripts and styles, opened tags, and addresses that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._hidden = False
        self.feed(text.replace(plotly.offline.get_plotlyjs(), ""))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden = tag in ("script", "style")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data-src")]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = self._hidden and tag not in ("script", "style")

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data


def test_one_file_that_loads_nothing(study_directory: Path, tmp_path: Path) -> None:
    path = write_page(study_directory, tmp_path / "new" / "r.html")
    page = Page(path.read_text())
    assert path == tmp_path / "new" / "r.html"
    assert page.addresses == ["data:,"]
    assert path.read_text().count("plotly.js v") == 1
    assert page.tags.count("script") == 1 + 3  # plotly.js and three figures
    assert 3e6 < path.stat().st_size < 8e6
    assert [file.name for file in path.parent.iterdir()] == ["r.html"]


def test_what_it_says(study_directory: Path, tmp_path: Path) -> None:
    text = Page(write_page(study_directory, tmp_path / "r.html").read_text()).text
    for words in ("tiny-gpt: spaces.demo", "CPU, 2 cores", "trials: 7 done, 2 stopped, 2 failed, 1 running",
                  "worker died: out of memory", "0123456789abcdef", "torch 2.13.0", "not measured", "2.352 ± 0.020",
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
            (study_directory, ("was scored for the 12 of 19 candidates", "shows the 19 candidates scored there")),
            (tmp_path / "study", ("was scored for the 2 of 3 candidates", "shows the 2 candidates scored there",
                                  "1 whose scoring a race stopped early are in neither picture"))):
        text = Page(write_page(directory, tmp_path / "r.html").read_text()).text
        for phrase in phrases:
            assert phrase in text, phrase
    assert "a race stopped" not in Page(write_page(study_directory, tmp_path / "r.html").read_text()).text


def test_everything_foreign_is_escaped(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.5], report=True, status="failed", reason="</script><script>alert('x')</script><b>")
    text = write_page(tmp_path / "study").read_text()
    assert "alert('x')" in Page(text).text
    assert not re.search(r"<script>alert", text)
    page = Page(text)
    assert page.tags.count("script") == 1 + 2
    assert "b" not in page.tags[page.tags.index("h2"):]


def test_headlines(frame: pd.DataFrame) -> None:
    assert headlines(frame) == [
        "Smallest within 1 % of dense: sparsity 0.40 (trial 5 round 1), 680k non-zero parameters (68% of dense), 2.82 "
        "MB stored (70%), text/bits_per_byte 2.025 ± 0.020, dense 2.010 ± 0.020.",
        "9 of 12 candidates scored on the report split are on the frontier, from sparsity 0.10 to 0.78; 19 candidates "
        "were made in all. Hypervolume 0.597 (0.595 to 0.599 on other items, at 95 %; relative to dense in size, by non-zero "
        "parameters, and in quality; half the size at equal quality alone gives 0.5).",
        "The frontier bends most at trial 3 round 2 (sparsity 0.55, text/bits_per_byte 2.140 ± 0.020): smaller ones lose more "
        "for what they save.",
        "Better than the dense baseline by more than one standard error: 3. Fine-tuning trained them further than the "
        "baseline, so this says that the baseline was not trained to its end, not that pruning helps."]


def test_headlines_compare_with_the_control(controlled: pd.DataFrame) -> None:
    sentences = headlines(controlled)
    assert sentences[0] == (
        "Smallest within 1 % of dense: sparsity 0.40 (trial 5 round 1), 680k non-zero parameters (68% of dense), "
        "2.82 MB stored (70%), text/bits_per_byte 2.025 ± 0.020, dense 2.010 ± 0.020, dense control 1.935 ± 0.020: a "
        "drop of 0.015 ± 0.028 against dense and of 0.090 ± 0.028 against the control.")
    assert sentences[1] == "No candidate is within 1 % of the dense control."
    assert sentences[-2] == (
        "The dense control, which has the longest trial's fine-tuning and is not pruned, is at text/bits_per_byte 1.935 ± "
        "0.020, dense at 2.010 ± 0.020: fine-tuning alone gains 0.075 ± 0.028.")
    assert sentences[-1] == "Better than the dense baseline by more than one standard error: 3; than the dense control: 0."
    assert not any("trained them further" in sentence for sentence in sentences)


def test_one_sentence_where_dense_and_control_have_the_same_neighbour(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    study.trial(0, [0.2, 0.8], report=True, finetune_epochs=1.0)
    study.control()
    sentences = headlines(load(tmp_path / "study"))
    assert sentences[0].startswith("Smallest within 1 % of dense, and of the dense control: sparsity 0.20")
    assert sum("control: sparsity" in sentence for sentence in sentences) == 1


def test_what_was_not_fine_tuned_is_not_said_to_be_trained_further(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study")
    study.dense()
    (key,) = study.trial(0, [0.1], report=True)
    frame = load(tmp_path / "study")
    frame.loc[frame["key"] == key, "report/text/bits_per_byte"] = 1.5
    assert headlines(frame)[-1] == "Better than the dense baseline by more than one standard error: 1."
    assert "none, since nothing was fine-tuned" in Page(write_page(tmp_path / "study").read_text()).text
    study.trial(1, [0.2], report=True, finetune_epochs=1.0)
    frame = load(tmp_path / "study")
    frame.loc[frame["status"] != "dense", "report/text/bits_per_byte"] = 1.5
    assert "error: 2. Fine-tuning trained 1 of them further than the baseline" in headlines(frame)[-1]


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
    assert "dense controlround 1: diverged" in text
    assert "In amber" not in text


def test_headlines_for_an_accuracy(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path / "study", objective="last_word/acc")
    study.dense()
    study.trial(0, [0.1, 0.3, 0.8], report=True)
    sentences = headlines(load(tmp_path / "study"))
    assert sentences[0].startswith("Smallest within 1 point of dense: sparsity 0.10")


def test_optimism_by_hand(frame: pd.DataFrame) -> None:
    without_dense = frame[frame["status"] != "dense"]
    assert optimism(without_dense).empty
    table = optimism(frame)
    # both splits follow one rule, but report adds 0.015 to candidates and 0.01 to dense: optimism is 0.005
    assert table["optimism"].tolist() == pytest.approx([0.005] * len(table))
    assert table["optimism_stderr"].tolist() == pytest.approx([0.04] * len(table))  # sqrt of 4 * 0.02^2
    row = table[(table["trial"] == 1) & (table["round"] == 5)].iloc[0]
    assert row["selection_loss"] == pytest.approx(1.2 * 0.125 - 0.05)


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


def test_a_folder_is_not_a_page(study_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the page must be a file, got the folder"):
        write_page(study_directory, tmp_path)
