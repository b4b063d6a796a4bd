"""Writes real study directories, with made-up numbers that follow simple rules, through raysearch.study.ledger."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from raysearch.config import Action, Metric, ServingSettings, TrialConfig, study_of
from raysearch.search.control import due_control
from raysearch.study.files import write_record
from raysearch.study.items import Items, form_of, write_items
from raysearch.study.ledger import Ledger
from raysearch.study.records import Provenance, RoundRecord, Served, SpeedRecord, StudyRecord, TrialRecord, hash_json, round_key

NUM_PRUNABLE = 800_000
NUM_PARAMETERS = 1_000_000
PROVENANCE = Provenance(created_at="2026-11-23T09:00:00+00:00", git_commit="0123456789abcdef",
                        versions={"raysearch": "0.1.0", "torch": "2.13.0", "ray": "2.60.0"},
                        device="CPU, 2 cores", hostname="laptop")
ROOT = hash_json("dense baseline of the synthetic study")
EVIL = "loss is NaN in round 1 <script>alert('x')</script> & \"more\""


def metrics(sparsity: float, tuning: float, shift: float = 0.0) -> dict[str, Metric]:
    """Bits per byte 2 + 1.2 s^3 - tuning + shift; accuracy 0.6 - 0.3 s^2 + tuning / 4 - shift."""
    bits = 2.0 + 1.2 * sparsity**3 - tuning + shift
    accuracy = min(1.0, max(0.0, 0.6 - 0.3 * sparsity**2 + tuning / 4 - shift))
    return {"text/bits_per_byte": Metric(value=bits, stderr=0.02, num_items=120),
            "last_word/acc": Metric(value=accuracy, stderr=math.sqrt(accuracy * (1 - accuracy) / 200), num_items=200),
            "last_word/perplexity": Metric(value=math.exp(bits), stderr=None, num_items=200)}


def items(scored: dict[str, Metric], key: str, split: str) -> dict[str, Items]:
    """Items whose metrics are the scored ones: of each split the same for all candidates, 10 of "text" to a document, which
    differ by luck of their own and, a fifth as much, of the candidate."""
    made = {}
    for name, metric in scored.items():
        shared, own = np.random.default_rng([split == "report"]), np.random.default_rng([int(key, 16), split == "report"])
        noise = shared.standard_normal(metric.num_items) + own.standard_normal(metric.num_items) / 5
        form, n = form_of(name), np.arange(metric.num_items)
        ratio = math.log(metric.value) if form.is_exponential else metric.value * form.unit
        cluster = n // 10 if name.startswith("text") else n + 1000
        made[name] = Items(ratio + 0.2 * (noise - noise.mean()), np.ones(len(n)), cluster.astype(np.uint64), n)
    return made


class SyntheticStudy:
    """A study directory to fill trial by trial."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.ledger = Ledger(directory)
        self.ledger.write_study(StudyRecord(
            study=study_of(path="/models/tiny-gpt", **{"tasks": ("text", "last_word"), **settings}), space="spaces.demo",
            space_hash="abc", root_key=ROOT, provenance=PROVENANCE))

    def dense(self, report: bool = True) -> None:
        self._round(ROOT, None, None, 0, 0.0, metrics(0.0, 0.0))
        if report:
            self._report(ROOT, metrics(0.0, 0.0, shift=0.01))

    def trial(self, number: int, sparsities: list[float], status: str = "done", report: bool = False,
              num_finished: int | None = None, reason: str | None = None, **config: Any) -> list[str]:
        """One trial of one round per sparsity; returns its keys. Fine-tuning epochs e earn 0.1 e / (1 + e) bits."""
        if "threshold" not in config and "rate" not in config:
            config = {"target_sparsity": sparsities[-1], **config}
        settings = TrialConfig(**{"num_rounds": len(sparsities), **config})
        tuning = 0.1 * settings.finetune_epochs / (1 + settings.finetune_epochs)
        actions = tuple(
            Action(scope=settings.scope, sparsity=None if settings.threshold else sparsity,
                   threshold=settings.threshold, threshold_unit=settings.threshold_unit,
                   l1_lambda=settings.l1_lambda, learning_rate=settings.learning_rate if tuning else 0.0,
                   finetune_tokens=int(1000 * settings.finetune_epochs)) for sparsity in sparsities)
        keys: list[str] = []
        for depth, (action, sparsity) in enumerate(zip(actions, sparsities), start=1):
            if num_finished is not None and depth > num_finished:
                break
            parent = keys[-1] if keys else ROOT
            keys.append(round_key(parent, action))
            penalty = 0.15 * sparsity if settings.scope == "layer" else 0.0
            self._round(keys[-1], parent, action, depth, sparsity, metrics(sparsity, tuning - penalty))
            if report:
                self._report(keys[-1], metrics(sparsity, tuning - penalty, shift=0.015))
        self.ledger.write_trial(TrialRecord(
            number=number, config=settings, actions=actions, keys=tuple(keys), status=status, reason=reason,
            started_at="2026-11-23T09:00:00+00:00", seconds=12.5 * len(keys)))
        return keys

    def finish(self, number: int, status: str = "done", num_finished: int | None = None, **changes: Any) -> list[str]:
        """Plays the gang of a trial or a control that was begun: writes its rounds, with its actions' sparsities, and its
        record."""
        begun = self.ledger.trial(number)
        keys: list[str] = []
        for depth, action in enumerate(begun.actions[:num_finished], start=1):
            parent = keys[-1] if keys else ROOT
            keys.append(round_key(parent, action))
            epochs, sparsity = action.finetune_tokens / 1000, action.sparsity or 0.0
            self._round(keys[-1], parent, action, depth, sparsity, metrics(sparsity, 0.1 * epochs / (1 + epochs)))
        self.ledger.write_trial(begun.model_copy(update={"keys": tuple(keys), "status": status, **changes}))
        return keys

    def control(self, report: bool = True, **changes: Any) -> list[str]:
        """The dense control of the trials so far, or its part that `changes` of `finish` say; returns its keys."""
        due = due_control(self.ledger, self.ledger.study().study)
        assert due is not None
        self.ledger.write_trial(due)
        keys = self.finish(due.number, **changes)
        if report:
            self._report(keys[-1], {
                name: metric.model_copy(update={"value": metric.value + (0.01 if name == "text/bits_per_byte" else -0.01)})
                for name, metric in self.ledger.candidate(keys[-1]).metrics.items()})
        return keys

    def speed(self, key: str, decode_ms: float, tokens_per_s: float = 1e5, provenance: Provenance = PROVENANCE,
              **serving: int) -> None:
        """What `raysearch measure` found; the dense model takes 8 ms a step."""
        one, other = (Served(scoring_tokens_per_s=rate, decode_ms=ms, resident_bytes=4_000_000)
                      for rate, ms in ((tokens_per_s, decode_ms), (5e4, 8.0)))
        write_record(self.ledger.speed_path(key), SpeedRecord(
            key=key, serving=ServingSettings(**serving), served=one, dense=other, dtype="float32", form="dense",
            provenance=provenance))

    def _round(self, key: str, parent: str | None, action: Action | None, depth: int, sparsity: float,
               scored: dict[str, Metric]) -> None:
        zeros = round(sparsity * NUM_PRUNABLE)
        record = RoundRecord(
            key=key, parent=parent, action=action, depth=depth, num_parameters=NUM_PARAMETERS,
            num_prunable=NUM_PRUNABLE, num_nonzero=NUM_PARAMETERS - zeros, sparsity=zeros / NUM_PRUNABLE,
            model_sparsity=zeros / NUM_PARAMETERS, layer_sparsity={},
            stored_bytes=min(4 * NUM_PARAMETERS, 4 * (NUM_PARAMETERS - zeros) + NUM_PRUNABLE // 8),
            resident_bytes=4 * NUM_PARAMETERS, metrics=scored, train_loss=None, prune_s=0.25, finetune_s=2.0,
            evaluate_s=0.75, weights_sha256=None, provenance=PROVENANCE,
            predicted_ms=10 - 5 * sparsity if self.ledger.study().study.search.predicts_ms else None)
        self.ledger.write_twice(f"rounds/{key}/record.json", record)
        write_items(self.ledger.items_path(key, "selection"), items(scored, key, "selection"))

    def _report(self, key: str, scored: dict[str, Metric]) -> None:
        self.ledger.write_report_metrics(key, scored, items(scored, key, "report"))


def twelve_trials(directory: Path, controlled: bool = False) -> Path:
    """12 trials: 7 done, 2 failed (one before its first round), 2 stopped, 1 running; a shared prefix (trials 0 and
    1), a duplicate (2 and 6), threshold mode (4), and report metrics on trials 1, 2, 3, 5 only. If `controlled`, with the
    dense control, which is that of trial 3: 3 rounds of 3 epochs, so 2 - 0.075 bits per byte."""
    study = SyntheticStudy(directory)
    study.dense()
    linear = {"schedule": "linear", "finetune_epochs": 1.0}
    study.trial(0, [0.1, 0.2, 0.3], **linear)
    study.trial(1, [0.1, 0.2, 0.3, 0.4, 0.5], report=True, **linear)
    study.trial(2, [0.6], report=True, finetune_epochs=2.0)
    study.trial(3, [0.3, 0.55, 0.7], report=True, schedule="cubic", finetune_epochs=3.0, l1_lambda=1e-4)
    study.trial(4, [0.35], schedule="one_shot", threshold=0.5, threshold_unit="std", num_rounds=1)
    study.trial(5, [0.4, 0.64, 0.784], report=True, schedule="constant", rate=0.4, finetune_epochs=2.0)
    study.trial(6, [0.6], finetune_epochs=2.0)
    study.trial(7, [0.5, 0.8], scope="layer", schedule="exponential", finetune_epochs=0.5, status="stopped",
                num_finished=1, reason="the rest of its path cannot reach the frontier")
    study.trial(8, [0.9], status="failed", num_finished=0, learning_rate=0.1, finetune_epochs=1.0, reason=EVIL)
    study.trial(9, [0.45, 0.75, 0.9], schedule="cosine", scope="layer", finetune_epochs=1.0, status="failed",
                num_finished=2, reason="worker died: out of memory")
    study.trial(10, [0.2, 0.4, 0.6], schedule="linear", scope="row", finetune_epochs=0.5, status="stopped",
                num_finished=2, reason="time budget is spent")
    study.trial(11, [0.25, 0.5], schedule="linear", finetune_epochs=1.0, status="running", num_finished=1)
    if controlled:
        study.control()
    return directory
