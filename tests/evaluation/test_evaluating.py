"""evaluate() equals lm-eval's own evaluation with its Hugging Face backend, adds standard errors, leaves no trace."""

import hashlib
import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from tiny_models import story, tiny_model

from raysearch.config import higher_is_better
from raysearch.evaluation import Race, Scorer, Task, evaluate, forward_sizes, heldout_tasks, load_tasks, metric_names
from raysearch.evaluation.generation import shared_prefix
from raysearch.evaluation.item_task import ItemTask
from raysearch.evaluation.racing import item_order
from raysearch.study.items import Items
from raysearch.training.finetune import Diverged

DOCUMENTS = [story(7 * n) for n in range(12)]
ALL = ["text", "last_word", "choice"]


def write_questions(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Questions, some of which the random model answers right because its answer was asked for."""
    (folder / "triviaqa").mkdir()
    with (folder / "triviaqa/validation.jsonl").open("w") as lines:
        for n in range(12):
            question = f"who saw the dog of house {n}"
            prompt = tokenizer(f"Question: {question}?\nAnswer:", return_tensors="pt")
            made = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1]:]
            text = tokenizer.decode(made, skip_special_tokens=True)
            for stop in ("\n", ".", ","):
                text = text.split(stop)[0]
            answer = text.strip() if n % 3 == 0 and text.strip() else "nobody"
            lines.write(json.dumps({"question": question, "answer": ["noone", answer]}) + "\n")
    return folder


@pytest.mark.parametrize("num_fewshot", [0, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equals_lm_eval(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str,
                        num_fewshot: int) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # of lm-eval's bootstrap
    model = tiny_model(family, context=512)
    data_dir = write_questions(tmp_path, model, tokenizer)

    def tasks() -> list[Any]:
        return [*heldout_tasks(DOCUMENTS, ALL, limit=10), *load_tasks(["triviaqa"], data_dir=data_dir)]

    ours = evaluate(Scorer(model, tokenizer), tasks(), num_fewshot=num_fewshot)
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    results = lm_eval.simple_evaluate(model=backend, tasks=tasks(), num_fewshot=num_fewshot, bootstrap_iters=100,
                                      task_manager=lm_eval.tasks.TaskManager(include_defaults=False))["results"]
    compared = 0
    for task, columns in results.items():
        for column, value in columns.items():
            name = column.partition(",")[0]
            if f"{task}/{name}" not in ours.metrics:
                continue
            metric = ours.metrics[f"{task}/{name}"]
            if name in ("acc", "acc_norm", "exact_match"):
                assert metric.value == value
                assert metric.stderr == pytest.approx(columns[column.replace(",", "_stderr,")], rel=1e-12)
            else:
                assert metric.value == pytest.approx(value, rel=1e-5)
            compared += 1
    assert compared == 8
    if num_fewshot == 0:
        assert ours.metrics["triviaqa/exact_match"].value > 0


def test_every_metric_has_a_stderr_a_direction_and_items(gpt2: Any, tokenizer: Any) -> None:
    tasks = heldout_tasks(DOCUMENTS, ALL)
    result = evaluate(Scorer(gpt2, tokenizer), tasks)
    assert set(metric_names(tasks)) == set(result.metrics) == {
        "text/bits_per_byte", "text/byte_perplexity", "text/word_perplexity", "text/token_perplexity", "last_word/acc",
        "last_word/perplexity", "choice/acc", "choice/acc_norm"}
    for key, metric in result.metrics.items():
        assert metric.stderr is not None
        assert metric.stderr > 0 or metric.value in (0, 1)
        items = result.items[key]
        assert items.item.tolist() == list(range(metric.num_items))
        assert higher_is_better(key) == ("acc" in key)
        ratio = items.numerator.sum() / items.weight.sum()
        made = math.exp(ratio) if "perplexity" in key else ratio / math.log(2) if "bits" in key else ratio
        assert metric.value == pytest.approx(made, rel=1e-9)
    weights = {name: result.items[f"text/{name}"].weight.tolist() for name in ("bits_per_byte", "word_perplexity",
                                                                               "token_perplexity")}
    texts = [item["text"] for item in tasks[0].dataset["test"]]
    assert weights == {"bits_per_byte": [len(text.encode()) for text in texts],
                       "word_perplexity": [len(re.split(r"\s+", text)) for text in texts],
                       "token_perplexity": [len(tokenizer(text)["input_ids"]) for text in texts]}


def test_a_cluster_is_a_heldout_items_document_and_else_the_item(gpt2: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("gpt2", context=512)
    data_dir = write_questions(tmp_path, model, tokenizer)
    asked = [*load_tasks(["triviaqa"], data_dir=data_dir), *heldout_tasks(DOCUMENTS, ALL)]
    items = evaluate(Scorer(model, tokenizer), asked).items
    documents = {int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") for document in DOCUMENTS}
    for name in ("text/bits_per_byte", "text/token_perplexity", "last_word/acc", "choice/acc_norm"):
        assert set(items[name].cluster.tolist()) == documents
    assert len(items["choice/acc"].cluster) > len(documents)
    assert len(set(items["triviaqa/exact_match"].cluster.tolist())) == 12
    # an item of the hub has no id but its index, which must not be one cluster in two tasks; its "document" is its own matter
    hub = [ConfigurableTask(config={"task": name, "output_type": "loglikelihood", "doc_to_text": "document", "doc_to_target":
                                    " end", "dataset_path": "json", "test_split": "train", "dataset_kwargs":
                                    {"data_files": str(write_lines(tmp_path))}, "metric_list": [{"metric": "acc"}]})
           for name in ("one", "two")]
    items = evaluate(Scorer(gpt2, tokenizer), hub).items
    assert len({*items["one/acc"].cluster.tolist(), *items["two/acc"].cluster.tolist()}) == 6


def write_lines(folder: Path) -> Path:
    (folder / "lines.jsonl").write_text("".join(json.dumps({"document": f"line {n}"}) + "\n" for n in range(3)))
    return folder / "lines.jsonl"


def last_words(aggregation: str) -> Task:
    items = heldout_tasks(DOCUMENTS, ["last_word"])[0].dataset["test"].to_list()
    metric = {"metric": "acc", "aggregation": aggregation, "higher_is_better": True}
    return ItemTask({"task": "odd", "output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "target",
                     "metric_list": [metric]}, items, [])


def test_a_metric_that_is_made_of_no_sums_has_no_items_and_no_races(gpt2: Any, tokenizer: Any) -> None:
    scorer = Scorer(gpt2, tokenizer)
    result, plain = evaluate(scorer, [last_words("median")]), evaluate(scorer, [last_words("mean")])
    assert result.items == {}
    values = plain.items["odd/acc"].numerator.tolist()
    assert result.metrics["odd/acc"].value == sorted(values)[len(values) // 2]
    assert result.metrics["odd/acc"].num_items == len(values)
    with pytest.raises(ValueError, match=r"racing needs a metric that is made of sums over items, odd/acc has the .*median"):
        evaluate(scorer, [last_words("median")], race=Race("odd/acc", 0, lambda items: False))


def test_a_lost_race_gives_the_objectives_items_in_their_order(gpt2: Any, tokenizer: Any,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.evaluation.racing.FIRST_ITEMS", 4)
    scorer, tasks, asked = Scorer(gpt2, tokenizer), heldout_tasks(DOCUMENTS, ALL), []
    whole = evaluate(scorer, tasks)

    def is_lost(items: Items) -> bool:
        asked.append(items)
        return len(asked) == 2

    raced = evaluate(scorer, tasks, race=Race("last_word/perplexity", 5, is_lost))
    order = item_order(len(whole.items["last_word/acc"].item), 5)[:6]
    assert raced.was_stopped
    assert not whole.was_stopped
    assert [items.item.tolist() for items in asked] == [order[:4].tolist(), order.tolist()]
    assert set(raced.items) == set(raced.metrics) == {"last_word/acc", "last_word/perplexity"}
    for name, items in raced.items.items():
        assert items.item.tolist() == order.tolist()
        assert items.cluster.tolist() == whole.items[name].cluster[order].tolist()
        assert items.numerator == pytest.approx(whole.items[name].numerator[order], rel=1e-5)


def test_token_perplexity_of_a_uniform_model_is_the_vocabulary(gpt2: Any, tokenizer: Any) -> None:
    torch.nn.init.zeros_(gpt2.transformer.ln_f.weight)
    torch.nn.init.zeros_(gpt2.transformer.ln_f.bias)
    metrics = evaluate(Scorer(gpt2, tokenizer), heldout_tasks(DOCUMENTS, ["text"])).metrics
    assert metrics["text/token_perplexity"].value == pytest.approx(gpt2.config.vocab_size, rel=1e-5)


@pytest.mark.parametrize(("task", "value"), [("text", torch.nan), ("last_word", torch.nan), ("choice", torch.inf)])
def test_scores_that_are_no_numbers_are_divergence(gpt2: Any, tokenizer: Any, task: str, value: float) -> None:
    """An accuracy would be finite: the argmax of NaN is some answer."""
    gpt2.transformer.ln_f.bias.data[0] = value
    with pytest.raises(Diverged, match=f"the log-probability of item 0 of task {task} is nan: the model gives no numbers"):
        evaluate(Scorer(gpt2, tokenizer), heldout_tasks(DOCUMENTS, [task], limit=3))


def test_a_perplexity_that_overflows_is_divergence(gpt2: Any, tokenizer: Any) -> None:
    gpt2.transformer.ln_f.weight.data *= 1e4
    with pytest.raises(Diverged, match="^last_word/perplexity is inf with a standard error of"):
        evaluate(Scorer(gpt2, tokenizer), heldout_tasks(DOCUMENTS, ["last_word"], limit=5))


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity_of_every_task(gpt2: Any, tokenizer: Any) -> None:
    gpt2.transformer.ln_f.weight.data.zero_()
    gpt2.transformer.ln_f.bias.data.zero_()
    found = evaluate(Scorer(gpt2, tokenizer), heldout_tasks(DOCUMENTS, ALL, limit=5)).perplexities
    assert found == pytest.approx(dict.fromkeys(ALL, gpt2.config.vocab_size), rel=0.02)  # tokens across a boundary may merge


def test_no_trace_random_states_output_logs(gpt2: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str],
                                            caplog: pytest.LogCaptureFixture) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    evaluate(Scorer(gpt2, tokenizer), heldout_tasks(DOCUMENTS, ALL, limit=4), num_fewshot=1)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert caplog.records == []


def test_prompts_and_tokens_are_prepared_once(gpt2: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = heldout_tasks(DOCUMENTS, ALL)
    scorer = Scorer(gpt2, tokenizer)
    first = evaluate(scorer, tasks)
    monkeypatch.setattr(type(tasks[0]), "fewshot_context", None)
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    monkeypatch.setattr(Scorer, "_score_batch", lambda self, layout, slices: torch.zeros(2, len(layout.targets)))
    start = time.process_time()
    second = evaluate(scorer, tasks)
    assert time.process_time() - start < 0.2
    assert {key: metric.num_items for key, metric in first.metrics.items()} == {
        key: metric.num_items for key, metric in second.metrics.items()}


def test_equal_calls_give_equal_results(gpt2: Any, tokenizer: Any) -> None:
    scorer = Scorer(gpt2, tokenizer)
    one, other = (evaluate(each, heldout_tasks(DOCUMENTS, ALL, limit=5)) for each in (scorer, Scorer(gpt2, tokenizer)))
    assert one.metrics == other.metrics
    assert list(one.items) == list(other.items)
    assert all(np.array_equal(a, b) for name in one.items for a, b in zip(one.items[name], other.items[name]))


def test_samples_file(gpt2: Any, tokenizer: Any, tmp_path: Path) -> None:
    result = evaluate(Scorer(gpt2, tokenizer), heldout_tasks(DOCUMENTS, ALL, limit=5), limit=3,
                      samples_path=tmp_path / "samples.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["text"] * 3 + ["last_word"] * 3 + ["choice"] * 3
    assert [row["metrics"]["acc"] for row in rows[3:6]] == result.items["last_word/acc"].numerator.tolist()
    assert len({row["item_id"] for row in rows}) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_forward_sizes_are_a_batch_of_scoring_and_the_slots_of_generation(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("gpt2", context=512)
    questions = load_tasks(["triviaqa"], data_dir=write_questions(tmp_path, model, tokenizer))
    scorer = Scorer(model, tokenizer, batch_tokens=100)
    texts = heldout_tasks(DOCUMENTS, ["text"], limit=4)
    num_tokens = sum(len(scorer.tok_encode(item["text"])) for item in texts[0].dataset["test"])
    assert forward_sizes(scorer, texts) == {100: -(-num_tokens // 100)}
    prompts = [scorer.tok_encode(f"Question: who saw the dog of house {n}?\nAnswer:") for n in range(12)]
    longest, shared = max(map(len, prompts)), shared_prefix(list(map(tuple, prompts)))
    num_slots = 400 // (longest + 64)
    assert 1 < num_slots < 12
    num_fills = -(-12 // num_slots)
    assert forward_sizes(scorer, questions) == {num_slots: 16 * num_fills, num_slots * (longest - shared): num_fills}
    assert set(forward_sizes(scorer, texts + questions)) == {100, num_slots, num_slots * (longest - shared)}


def test_bad_arguments(gpt2: Any, tokenizer: Any) -> None:
    tasks = heldout_tasks(DOCUMENTS, ["choice"], limit=5)
    with pytest.raises(ValueError, match="limit must be at least 1 item; got 0"):
        evaluate(Scorer(gpt2, tokenizer), tasks, limit=0)
    with pytest.raises(ValueError, match="num_fewshot must be below the 5 examples of task 'choice'; got 5"):
        evaluate(Scorer(gpt2, tokenizer), tasks, num_fewshot=5)


def test_a_fresh_process_prints_nothing_at_import() -> None:
    command = [sys.executable, "-c", "import raysearch.evaluation"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
