"""The evaluation tasks, as lm-eval Task objects: held-out documents, the paper's six, any other of lm-eval's.

lm-eval renders the prompts and computes the metrics; what is pinned here is printed by `describe_tasks`. lm-eval is imported
where it is used, since to describe the tasks needs none of it.
"""

import csv
import difflib
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from raysearch.evaluation.heldout import choice_items, content_id, last_word_items, text_items
from raysearch.evaluation.own_tasks import check_own, is_own, own_tasks
from raysearch.study.text import first_line, json_lines, open_text
from raysearch.training.chats import is_chat

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from raysearch.evaluation.item_task import ItemTask

Split = Literal["selection", "report", "all"]
Item = dict[str, Any]

TOKEN_PERPLEXITY = "token_perplexity"
SHOT_POOL = 100
"""Few-shot examples of a file task are drawn from this many items, whatever the split and the limit, so that prompts do
not change with them."""

_ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_ACC_NORM = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
_PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
_EXACT_MATCH = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
                "ignore_punctuation": True}
_NO_ARTICLES = {"regexes_to_ignore": [r"\b(?:The |the |An |A |The |a |an )"]}
_CHOICE = {"output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "label"}
_LAST_WORD = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "target"}
_TRIM = [{"name": "remove_whitespace", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}]


@dataclass(frozen=True)
class FileTask:
    """One of the paper's tasks: where its items lie, how a line is read, and lm-eval's description of the rest."""

    files: tuple[str, ...]  # below the data directory, the first that exists
    lm_eval_name: str | None  # the hub task of lm-eval, None where lm-eval has none
    fields: Mapping[str, "Rule"]
    to_item: Callable[[Item], Item]
    config: Mapping[str, Any]
    variant: str


class Rule(NamedTuple):
    """What a field must hold."""

    text: str
    holds: Callable[[Any], bool]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


TEXT = Rule("a text that is not blank", _is_text)


def _question(description: str, question: str, until: Sequence[str], **metric: object) -> Item:
    return {
        "output_type": "generate_until", "description": description, "doc_to_text": question, "doc_to_target": "answer",
        "fewshot_delimiter": "\n" if description else "\n\n", "filter_list": _TRIM,
        "generation_kwargs": {"until": list(until), "do_sample": False, "temperature": 0.0, "max_gen_toks": 64},
        "metric_list": [{**_EXACT_MATCH, **metric}],
    }


_QUESTION_FIELDS = {"question": TEXT, "answer": Rule("a list of texts", _is_texts)}


def _question_item(row: Item) -> Item:
    return {"question": row["question"], "answer": row["answer"]}


STORY_COLUMNS = ("InputSentence1", "InputSentence2", "InputSentence3", "InputSentence4", "RandomFifthSentenceQuiz1",
                 "RandomFifthSentenceQuiz2", "AnswerRightEnding")

FILE_TASKS: dict[str, FileTask] = {
    "lambada": FileTask(
        ("lambada/test.jsonl",), "lambada_openai",
        {"text": Rule("a text of two words or more, with a space before the last",
                      lambda value: _is_text(value) and all(map(str.strip, value.rpartition(" ")[::2])))},
        lambda row: {"context": row["text"].rpartition(" ")[0], "target": " " + row["text"].rpartition(" ")[2]},
        {**_LAST_WORD, "metric_list": [_PERPLEXITY, _ACC]},
        "OpenAI's passages, as they are; target = the text after the last space, right when every token is the argmax",
    ),
    "storycloze": FileTask(
        ("storycloze/test.csv", "storycloze/validation.csv", "storycloze/test.jsonl"), "storycloze_2016",
        {**dict.fromkeys(STORY_COLUMNS[:6], TEXT), "AnswerRightEnding": Rule("1 or 2", lambda value: str(value) in ("1", "2"))},
        lambda row: {"context": " ".join(row[column] for column in STORY_COLUMNS[:4]),
                     "choices": [row[column] for column in STORY_COLUMNS[4:6]],
                     "label": int(row["AnswerRightEnding"]) - 1},
        {**_CHOICE, "metric_list": [_ACC]},
        "Story Cloze Test, the authors' CSV; four sentences, two endings",
    ),
    "hellaswag": FileTask(
        ("hellaswag/validation.jsonl",), "hellaswag",
        {"ctx": TEXT, "endings": Rule("a list of two texts or more, none of them blank",
                                      lambda value: _is_texts(value) and len(value) > 1 and all(map(str.strip, value))),
         "label": Rule("the number of the right ending, from 0 on", lambda value: str(value).isdecimal())},  # "3" on the hub
        lambda row: {"context": row["ctx"], "choices": row["endings"], "label": int(row["label"])},
        {**_CHOICE, "metric_list": [_ACC, _ACC_NORM]},
        "context, one space, ending; the file's text is used as it is, without lm-eval's activity label",
    ),
    "nq_open": FileTask(
        ("nq_open/validation.jsonl",), "nq_open", _QUESTION_FIELDS, _question_item,
        _question("Answer these questions:\n\n", "Q: {{question}}?\nA:", ["\n", ".", ","], **_NO_ARTICLES),
        "closed book, lm-eval's nq_open version 4 with all answers accepted",
    ),
    "webqs": FileTask(
        ("webquestions/test.jsonl", "webqs/test.jsonl"), None, _QUESTION_FIELDS, _question_item,
        _question("", "Q: {{question}}\nA:", ["\n"], **_NO_ARTICLES),
        "closed book, free-form greedy answer as in the GPT-3 evaluation (lm-eval's webqs chooses among answers)",
    ),
    "triviaqa": FileTask(
        ("triviaqa/validation.jsonl",), "triviaqa", _QUESTION_FIELDS, _question_item,
        _question("", "Question: {{question}}?\nAnswer:", ["\n", ".", ","]),
        "closed book, lm-eval's triviaqa version 3",
    ),
}

HELDOUT_CONFIGS: dict[str, tuple[Callable[..., Sequence[Item]], Mapping[str, Any], str]] = {
    "text": (
        text_items,
        {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text", "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]},
        "pieces of 1,600 characters of the held-out documents; token_perplexity is added by evaluate()",
    ),
    "last_word": (
        last_word_items,
        {**_LAST_WORD, "metric_list": [_ACC, _PERPLEXITY]},
        "LAMBADA-style: passages of 150 to 500 characters, last word of 3 letters or more that occurs before",
    ),
    "choice": (
        choice_items,
        {**_CHOICE, "metric_list": [_ACC, _ACC_NORM]},
        "HellaSwag-style: true continuation among four; three from elsewhere in the documents, of similar length",
    ),
}


def heldout_tasks(documents: Sequence[str], tasks: Sequence[str], *, limit: int | None = None,
                  seed: int = 0) -> "list[Task]":
    """Tasks made from the documents of one split; equal arguments give equal items.

    tasks: names among "text", "last_word", "choice"; limit: at most this many items of each, sampled with `seed`.
    ValueError for an unknown name, a limit below 1, or documents that give no item, as chats do: their text is the template's,
    and bits per byte of it say little about the answers.
    """
    from raysearch.evaluation.item_task import ItemTask

    check_limit(limit)
    if tasks and any(map(is_chat, documents)):
        raise ValueError(f"tasks {', '.join(tasks)} are made from running text, but the corpus holds chats; give other tasks, "
                         "those of lm-eval or YAML files of your own")
    item_tasks = []
    for name in tasks:
        if name not in HELDOUT_CONFIGS:
            raise ValueError(_unknown(name, HELDOUT_CONFIGS))
        cut, config, _ = HELDOUT_CONFIGS[name]
        items = cut(documents, limit=limit, seed=seed)
        if not items:
            others = [other for other in HELDOUT_CONFIGS if HELDOUT_CONFIGS[other][0](documents, limit=1, seed=seed)]
            raise ValueError(f"task {name!r} finds no item in the held-out documents, which need more running text; got "
                             f"{len(documents)} documents of {sum(map(len, documents))} characters, which can serve "
                             f"{' and '.join(others) or 'no task'}")
        item_tasks.append(ItemTask({"task": name, **config}, items, items[:SHOT_POOL]))
    return item_tasks


def load_tasks(names: Sequence[str], *, data_dir: Path | None = None, split: Split = "all",
               limit: int | None = None) -> "list[Task]":
    """Tasks by name: the paper's six from files below `data_dir`, or from the hub without it; any other of lm-eval's; those of
    a YAML file in lm-eval's form, or of a folder of them (`is_own`), whose data files are named from their folder.

    split: "selection" or "report" keep the half of the items that a hash of the item assigns to them. limit: the first
    items only; lines after the last one needed are not read. ValueError for an unknown name (with the nearest ones), a
    missing file, a malformed line (file, line and field), a data set that is not on this machine when offline.
    """
    check_limit(limit)
    tasks: list[Task] = []
    for name in names:
        if name in FILE_TASKS and (data_dir is not None):
            tasks.append(_file_task(name, data_dir, split, limit))
        elif name in HELDOUT_CONFIGS:
            raise ValueError(f"task {name!r} is made from held-out documents: it needs a corpus, not a data directory")
        else:
            for task in own_tasks(name) if is_own(name) else _hub_tasks(name):
                if split != "all" or limit is not None:
                    _keep(task, split, limit)
                tasks.append(task)
    return tasks


def item_identity(doc: Mapping[str, Any], index: int) -> str:
    """Its content's id, or the index in the task of an item of the hub."""
    return str(doc.get("item_id", index))


def item_cluster(task: "Task", doc: Mapping[str, Any], index: int) -> int:
    """64 bits: the document that a held-out item was cut from, in every task the same; any other item is its own cluster."""
    from raysearch.evaluation.item_task import ItemTask

    if isinstance(task, ItemTask) and "document" in doc:  # a data set of the hub may mean something else by that name
        return int(doc["document"], 16)
    return int(content_id(f"{task.config.task} {item_identity(doc, index)}"), 16)


def in_split(identity: str, split: Split) -> bool:
    """Whether the item of this identity belongs to the split; selection and report are disjoint halves of all."""
    return split == "all" or (hashlib.sha256(identity.encode()).digest()[0] % 2 == 0) == (split == "selection")


def describe_tasks() -> list[dict[str, str]]:
    """What is pinned, one row a task: task, items, prompt, target, shots, metrics, normalisation, variant."""
    rows = []
    for name, file_task in FILE_TASKS.items():
        source = f"DIR/{file_task.files[0]}, or lm-eval's {file_task.lm_eval_name or 'none'} from the hub"
        rows.append(_description(name, source, file_task.config, file_task.variant))
    for name, (_, config, variant) in HELDOUT_CONFIGS.items():
        rows.append(_description(name, "held-out documents of the corpus", config, variant))
    return rows


def _description(name: str, items: str, config: Mapping[str, Any], variant: str) -> dict[str, str]:
    metrics = config["metric_list"]
    generation = config.get("generation_kwargs")
    rules = [rule for rule in ("ignore_case", "ignore_punctuation") if metrics[0].get(rule)]
    rules += ["ignore articles"] if "regexes_to_ignore" in metrics[0] else []
    text, target = str(config["doc_to_text"]), str(config.get("doc_to_choice", config["doc_to_target"]))
    return {
        "task": name,
        "items": items,
        "prompt": json.dumps(config.get("description", "") + (text if "{" in text or not text else f"{{{{{text}}}}}")),
        "target": f"{{{{{target}}}}}" + (f", greedy until one of {json.dumps(generation['until'])}, at most "
                                         f"{generation['max_gen_toks']} tokens" if generation else ""),
        "shots": f"0 by default; drawn from train.jsonl or else the first {SHOT_POOL} selection items, seed 1234",
        "metrics": ", ".join(metric["metric"] for metric in metrics),
        "normalisation": ", ".join(rules).replace("_", " ") or ("by characters of the ending" if
                                                                _ACC_NORM in metrics else "none"),
        "variant": variant,
    }


def check_task(name: str) -> None:
    """ValueError of one sentence for a task that there is not, without lm-eval's index."""
    if is_own(name):
        check_own(name)
    elif name not in FILE_TASKS and name not in HELDOUT_CONFIGS:
        stems, occurs = _lm_eval_files(name)
        if not occurs:
            raise ValueError(_unknown(name, [*FILE_TASKS, *HELDOUT_CONFIGS, *stems]))


def _file_task(name: str, data_dir: Path, split: Split, limit: int | None) -> "ItemTask":
    from raysearch.evaluation.item_task import ItemTask

    task = FILE_TASKS[name]
    path = next((data_dir / file for file in task.files if (data_dir / file).is_file()), None)
    if path is None:
        raise ValueError(f"task {name!r} needs the file {data_dir / task.files[0]}, which does not exist")
    train = path.with_name("train" + path.suffix)
    shots: list[Item] = list(islice(_items(train, task), SHOT_POOL)) if train.is_file() else []
    shots_from_items = not shots  # then of the selection split only: the report split is published
    items: list[Item] = []
    for item in _items(path, task):
        if (limit is None or len(items) < limit) and in_split(item["item_id"], split):
            items.append(item)
        if shots_from_items and len(shots) < SHOT_POOL and in_split(item["item_id"], "selection"):
            shots.append(item)
        if limit is not None and len(items) == limit and len(shots) >= (SHOT_POOL if shots_from_items else 0):
            break
    if not items:
        raise ValueError(f"{path}: no items in the {split} split")
    return ItemTask({"task": name, **task.config}, items, shots)


def _items(path: Path, task: FileTask) -> Iterator[Item]:
    for number, row in _csv_rows(path) if path.suffix == ".csv" else json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be a JSON object, got {row!r:.80}")
        for field, rule in task.fields.items():
            if field not in row:
                raise ValueError(f"{where}: field {field!r} is missing; the fields are {', '.join(row) or 'none'}")
            if not rule.holds(row[field]):
                raise ValueError(f"{where}: field {field!r} must be {rule.text}, got {row[field]!r:.80}")
        item = task.to_item(row)
        if item.get("label", 0) >= len(item.get("choices", [0])):
            raise ValueError(f"{where}: field 'label' must be below the number of endings, {len(item['choices'])}, got "
                             f"{item['label']}")
        yield {"item_id": content_id(json.dumps(item, sort_keys=True)), **item}


def _csv_rows(path: Path) -> Iterator[tuple[int, Item]]:
    with open_text(path, newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            yield reader.line_num, {field: value for field, value in row.items() if field and value is not None}


def _hub_tasks(name: str) -> "list[Task]":
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask

    if name in FILE_TASKS and FILE_TASKS[name].lm_eval_name is None:
        source = "stanfordnlp/web_questions"
        config = {**FILE_TASKS[name].config, "task": name, "doc_to_target": "answers", "dataset_path": source,
                  "test_split": "test", "training_split": "train", "fewshot_split": "train"}
        tasks = {name: _downloaded(name, lambda: ConfigurableTask(config=config))}
    elif name in FILE_TASKS:
        folder = Path(lm_eval.tasks.__file__).parent / name  # lm-eval names its folders as we name these tasks
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        tasks = _downloaded(name, lambda: manager.load([FILE_TASKS[name].lm_eval_name])["tasks"])
    else:
        check_task(name)
        manager = lm_eval.tasks.TaskManager()  # builds the index of all 14,000 tasks: 7 s
        if name not in manager.all_tasks:
            raise ValueError(_unknown(name, [*FILE_TASKS, *HELDOUT_CONFIGS, *_lm_eval_files(name)[0], *manager.all_tasks]))
        tasks = _downloaded(name, lambda: manager.load([name])["tasks"])
    for task in tasks.values():
        if name in FILE_TASKS:
            task.config.task = name  # its name here, for lambada and for lambada_openai
    return list(tasks.values())


@functools.cache
def _lm_eval_files(name: str) -> tuple[list[str], bool]:
    """(names of lm-eval's task folders and files, whether `name` occurs in a file): without the index, in about a second.

    A task, group or tag of lm-eval is spelt out in some file, so a name that is in none is no task.
    """
    stems: dict[str, None] = {}
    occurs, wanted = False, name.encode()
    package = importlib.util.find_spec("lm_eval")
    assert package is not None
    assert package.origin is not None
    for folder, folders, files in os.walk(Path(package.origin).parent / "tasks"):
        folders.sort()
        stems.update(dict.fromkeys(each for each in folders if not each.startswith("__")))
        for file in files:
            if file.endswith(".yaml"):
                stems[file.removesuffix(".yaml")] = None
            if not occurs and not file.endswith((".py", ".pyc")):
                with open(os.path.join(folder, file), "rb") as opened:
                    occurs = wanted in opened.read()
    return sorted(stem for stem in stems if not stem.startswith("_")), occurs


def _downloaded(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ConnectionError) as error:  # datasets and huggingface_hub raise subclasses of these when offline
        folder = f"; give its file with a data directory: DIR/{FILE_TASKS[name].files[0]}" if name in FILE_TASKS else ""
        raise ValueError(f"task {name!r}: its data set is not on this machine and the hub cannot be reached "
                         f"({first_line(error)}){folder}") from error


def _keep(task: Any, split: Split, limit: int | None) -> None:
    """The task with the first `limit` items of the split only."""
    name = task.config.test_split or task.config.validation_split
    rows = task.dataset[name]
    kept = (index for index, row in enumerate(rows)
            if in_split(content_id(json.dumps(row, sort_keys=True, default=str)), split))
    task.dataset[name] = rows.select(list(islice(kept, limit)))


def _unknown(name: str, known: Iterable[str]) -> str:
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:9]
    return f"task {name!r} is not known; the nearest names are {', '.join(near)}"


def check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 item; got {limit}")
