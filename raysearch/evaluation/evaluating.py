"""`evaluate`: tasks and metrics are lm-eval's, the answers a scorer's; with a race, it may stop at the first items."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import weighted_perplexity
from lm_eval.api.model import LM
from lm_eval.api.task import Task

from raysearch.config import Metric
from raysearch.evaluation.racing import item_order, looks
from raysearch.evaluation.scorer import Scorer
from raysearch.evaluation.statistics import FORMS, LARGEST_EXPONENT, aggregate, estimate, to_items
from raysearch.evaluation.tasks import TOKEN_PERPLEXITY, check_limit, item_cluster, item_identity
from raysearch.study.files import new_file
from raysearch.study.items import Items
from raysearch.training.finetune import Diverged

FEWSHOT_SEED = 1234
"""lm-eval's default."""
_PREPARED: "WeakKeyDictionary[Task, dict[tuple[int | None, int], list[Instance]]]" = WeakKeyDictionary()
"""(limit, shots) -> requests of a task: a sweep scores the same items after every round."""


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`; the keys of the dictionaries are "task/metric"."""

    metrics: dict[str, Metric]
    items: dict[str, Items]
    """Of every metric that lm-eval makes of sums over items; in the order of the task, or in `item_order` when it was
    stopped."""
    perplexities: dict[str, float]
    """By task that scores text: per token, of each item its likeliest answer; a uniform guess reaches the vocabulary's size."""
    was_stopped: bool
    """The race was lost: only the objective's task was scored, and only its first items."""


@dataclass(frozen=True)
class Race:
    """Scores the objective's task first, in growing parts of a random order, and stops when `is_lost` says so."""

    objective: str
    """As "task/metric"."""
    seed: int
    """Of the order (racing.item_order)."""
    is_lost: Callable[[Items], bool]
    """Given the objective's items so far, in that order."""


def evaluate(scorer: LM, tasks: Sequence[Task], *, limit: int | None = None, num_fewshot: int | None = None,
             samples_path: Path | None = None, race: Race | None = None) -> Evaluation:
    """Scores every task. Metrics and their values are lm-eval's; each has a standard error over the items.

    limit: the first items of each task only; num_fewshot: examples in the prompt (None: the task's own number);
    samples_path: JSON lines {"task", "item_id", "metrics"} with lm-eval's per-item values. Tasks of whole text get
    token_perplexity as well. Touches no global random state, and prepares the prompts of a task only once: keep the
    task objects for the next call. With a `race` it may stop early. ValueError for a limit below 1, more shots than the task
    has examples, or a race for a metric that is not made of sums over items; Diverged where a number is not finite.
    """
    check_limit(limit)
    prepared = [_requests(task, limit, num_fewshot) for task in tasks]
    answered: list[Instance] = []
    if race is not None:
        stopped = _race(scorer, tasks, prepared, race, answered)
        if stopped is not None:
            return stopped
    done = set(map(id, answered))  # by identity: an Instance has no hash
    _respond(scorer, [request for requests in prepared for request in requests if id(request) not in done])
    return _summarised(scorer, list(zip(tasks, prepared)), samples_path)


def tasks_fingerprint(tasks: Sequence[Task]) -> str:
    """Hex; equal for equal names and items, and for a user's own tasks for equal files of their folder."""
    digest = hashlib.sha256()
    for task in tasks:
        for row in [task.config.task, *getattr(task, "written", ()), *task.eval_docs]:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def metric_names(tasks: Sequence[Task]) -> list[str]:
    """The metrics, as "task/metric", that `evaluate` will give."""
    names = []
    for task in tasks:
        # as `_process` names them: by the filter too where a task has several
        suffixes = [f",{each.name}" for each in task._filters] if len(task._filters) > 1 else [""]
        names += [f"{task.config.task}/{metric}{suffix}" for metric in task.aggregation() for suffix in suffixes]
        names += [f"{task.config.task}/{TOKEN_PERPLEXITY}"] * (task.OUTPUT_TYPE == "loglikelihood_rolling")
    return names


def forward_sizes(scorer: Scorer, tasks: Sequence[Task], *, num_fewshot: int | None = None) -> dict[int, int]:
    """Tokens per forward -> about how many such forwards `evaluate` will take."""
    return scorer.forward_sizes([request for task in tasks for request in _requests(task, None, num_fewshot)])


def _race(scorer: LM, tasks: Sequence[Task], prepared: list[list[Instance]], race: Race,
          answered: list[Instance]) -> Evaluation | None:
    """The evaluation of the items so far once the race is lost, else None; extends `answered`."""
    name, _, metric = race.objective.rpartition("/")
    task, requests = next((task, requests) for task, requests in zip(tasks, prepared) if task.config.task == name)
    if (aggregation := aggregation_of(task, metric)) not in FORMS:
        raise ValueError(f"racing needs a metric that is made of sums over items, {race.objective} has the aggregation "
                         f"{aggregation}; choose another objective, or racing_level = None")
    groups = list(_by_item(requests).values())
    order, first = item_order(len(groups), race.seed), 0
    for look in looks(len(groups)):
        part = [request for item in order[first:look] for request in groups[item]]
        _respond(scorer, part)
        answered.extend(part)
        first = look
        evaluation = _summarised(scorer, [(task, list(answered))], None)
        if race.is_lost(evaluation.items[race.objective]):
            return replace(evaluation, was_stopped=True)
    return None


def _by_item(requests: Sequence[Instance]) -> dict[int, list[Instance]]:
    """The requests of each item, by its index in the task; a multiple choice has one for each answer."""
    by_item: dict[int, list[Instance]] = {}
    for request in requests:
        by_item.setdefault(request.doc_id, []).append(request)
    return by_item


def aggregation_of(task: Any, metric: str) -> Callable[[Any], float]:
    """Of a metric as `_process` names it."""
    return task.aggregation().get(metric.split(",")[0], weighted_perplexity)  # token_perplexity is ours


def _summarised(scorer: LM, answered: Sequence[tuple[Any, list[Instance]]], samples_path: Path | None) -> Evaluation:
    metrics: dict[str, Metric] = {}
    items: dict[str, Items] = {}
    perplexities: dict[str, float] = {}
    samples: list[str] = []
    for task, requests in answered:
        name, by_item = task.config.task, _by_item(requests)
        if (perplexity := _perplexity(scorer, requests)) is not None:
            perplexities[name] = perplexity
        values = _process(scorer, task, requests, by_item)
        docs = {index: group[0].doc for index, group in by_item.items()}
        clusters = [item_cluster(task, doc, index) for index, doc in docs.items()]
        for metric, column in values.items():
            aggregation, key = aggregation_of(task, metric), f"{name}/{metric}"
            if (form := FORMS.get(aggregation)) is not None:
                items[key] = to_items(column, form, clusters, list(docs))
                value, stderr = estimate(items[key], form)
            else:
                value, stderr = aggregate(column, aggregation)
            if not math.isfinite(value) or not math.isfinite(stderr or 0):
                raise Diverged(f"{key} is {value} with a standard error of {stderr}: the model gives no numbers")
            metrics[key] = Metric(value=value, stderr=stderr, num_items=len(column))
        for row, (index, doc) in enumerate(docs.items()):
            sample = {"task": name, "item_id": item_identity(doc, index),
                      "metrics": {key: column[row] for key, column in values.items()}}
            samples.append(json.dumps(sample, default=float) + "\n")
    if samples_path is not None:
        with new_file(samples_path) as aside:
            aside.write_text("".join(samples))
    return Evaluation(metrics, items, perplexities, False)


def _perplexity(scorer: Any, requests: Sequence[Instance]) -> float | None:
    """Per token of what the requests score, of each item its likeliest answer; None where they generate."""
    if not requests or requests[0].request_type == "generate_until":
        return None
    special = None if requests[0].request_type == "loglikelihood_rolling" else False  # a whole text has its own
    likeliest: dict[int, tuple[float, float, int]] = {}  # item -> nats per token, nats, tokens
    for request in requests:
        response, num_tokens = request.resps[0], len(scorer.tok_encode(request.args[-1], add_special_tokens=special))
        nats = -(response[0] if isinstance(response, tuple) else response)
        answer = (nats / max(1, num_tokens), nats, num_tokens)
        likeliest[request.doc_id] = min(answer, likeliest.get(request.doc_id, answer))
    mean = sum(nats for _, nats, _ in likeliest.values()) / max(1, sum(num for *_, num in likeliest.values()))
    return math.exp(mean) if mean < LARGEST_EXPONENT else math.inf


def _requests(task: Any, limit: int | None, num_fewshot: int | None) -> list[Instance]:
    """lm-eval's build_all_requests without its progress bar, kept for as long as the task lives."""
    shots = task.config.num_fewshot or 0 if num_fewshot is None else num_fewshot
    known = _PREPARED.setdefault(task, {})
    if (limit, shots) not in known:
        if shots:
            examples = len(task.sampler.fewshot_docs())
            if not 0 < shots < examples:  # lm-eval draws one more, to leave the item itself out
                raise ValueError(f"num_fewshot must be below the {examples} examples of task {task.config.task!r}; got "
                                 f"{shots}")
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        requests: list[Instance] = []
        for doc_id, doc in task.doc_iterator(limit=limit):
            context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
            metadata = (task.config.task, doc_id, task.config.repeats)
            request = task.construct_requests(doc=doc, ctx=context, metadata=metadata)
            requests.extend(request if isinstance(request, list) else [request])
        known[limit, shots] = requests
    return known[limit, shots]


def _respond(scorer: Any, requests: Sequence[Instance]) -> None:
    by_type: dict[str, list[Instance]] = {}
    for request in requests:
        request.resps, request.filtered_resps = [], {}  # kept requests hold the last round's answers
        by_type.setdefault(request.request_type, []).extend([request] * (request.repeats or 1))
    for request_type, group in by_type.items():
        for request, response in zip(group, getattr(scorer, request_type)(group), strict=True):
            logprob = response[0] if isinstance(response, tuple) else response  # or generated text
            if isinstance(logprob, float) and not math.isfinite(logprob):
                raise Diverged(f"the log-probability of item {request.doc_id} of task {request.task_name} is {logprob}: the "
                               "model gives no numbers")
            request.resps.append(response)


def _process(scorer: Any, task: Any, requests: list[Instance], by_item: Mapping[int, list[Instance]]) -> dict[str, list[Any]]:
    """Values of each metric over the items, in their order, by the task's own rules."""
    task._instances = requests  # what lm-eval's filters read
    task.apply_filters()
    values: dict[str, list[Any]] = {}
    filters = list(requests[0].filtered_resps)
    for key in filters:
        for group in by_item.values():
            results = [request.filtered_resps[key] for request in sorted(group, key=lambda request: request.idx)]
            for metric, value in task.process_results(group[0].doc, results).items():
                values.setdefault(metric if len(filters) == 1 else f"{metric},{key}", []).append(value)
            if group[0].request_type == "loglikelihood_rolling":
                num_tokens = len(scorer.tok_encode(group[0].args[0]))
                values.setdefault(TOKEN_PERPLEXITY, []).append((results[0], num_tokens))
    return values
