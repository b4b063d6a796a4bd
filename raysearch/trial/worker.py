"""What one rank keeps between trials: the engine, the text, the evaluation."""

import os
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from raysearch.cluster.placement import USABLE, MicroBatch, largest_micro_batch, work_in_training
from raysearch.config import Action, Study, higher_is_better
from raysearch.evaluation import Evaluation, Race, Scorer, evaluate
from raysearch.evaluation.racing import in_item_order, is_dominated, item_losses
from raysearch.kernels.device import device_name
from raysearch.models.model import model_size, vocab_size
from raysearch.study.items import Items
from raysearch.study.ledger import Ledger
from raysearch.study.records import Latency, RoundRecord
from raysearch.training.engine import Engine
from raysearch.training.hardware import can_compile, device_type, memory_bytes
from raysearch.trial.checkpoints import Checkpoints
from raysearch.trial.inputs import Inputs, same_inputs
from raysearch.trial.latency import measured_latency

START_LIMIT_S = 600.0
"""Shortest timeout of the process group: its ranks also wait for each other's imports."""


class Worker:
    """One rank's workbench. Collective: every rank of the gang builds one and calls it in the same order."""

    def __init__(self, study: Study, ledger: Ledger, inputs: Inputs) -> None:
        self.study, self.ledger, self.inputs = study, ledger, inputs
        self.gang = f"{study.cluster.num_ranks} x {device_name(device_type())}, ZeRO-{study.cluster.zero_stage}"
        self._size = model_size(study.model.path)
        self._fits = ledger.micro_batch_tokens().get(self.gang)
        planned = self.micro_batch()
        self.engine = Engine(
            study.model.path, prunable=study.model.prunable, zero_stage=study.cluster.zero_stage, dtype=study.model.dtype,
            batch_tokens=study.training.batch_tokens, context_tokens=study.data.context_tokens,
            weight_decay=study.training.weight_decay, timeout_s=max(study.cluster.round_limit_s, START_LIMIT_S),
            micro_batch=planned, compiled=can_compile() if study.cluster.compile == "auto" else study.cluster.compile)
        self.vocab_size = vocab_size(self.engine.model.config)
        self.scorer = Scorer(self.engine.model, inputs.tokenizer, rank=self.engine.rank, world_size=self.engine.world_size,
                             gather=self.engine.gather_objects, lockstep=study.cluster.zero_stage == 3)
        self.loaded_key: str | None = None
        """The candidate whose weights the engine holds now; None while they are being changed."""
        self.checkpoints: Checkpoints | None = None
        """Of the one round that is worth them."""

    def micro_batch(self, *rounds: Action) -> MicroBatch:
        """Of a round: the largest that is planned to fit, or as much as fitted where less did."""
        cluster = self.study.cluster
        assert isinstance(cluster.num_ranks, int), "placed"
        assert isinstance(cluster.zero_stage, int), "placed"
        share = min(1.0, cluster.gpus_per_rank) if cluster.gpus_per_rank else 1 / cluster.num_ranks
        planned = largest_micro_batch(self._size, self.study, cluster.num_ranks, cluster.zero_stage,
                                      USABLE * memory_bytes() * share, work_in_training(rounds))
        return planned._replace(tokens=min(planned.tokens, self._fits or planned.tokens))

    def halve_micro_batch(self) -> bool:
        """After memory ran out in a step: whether the round may be tried again in this process. The study remembers half the
        size, with which a gang of several ranks starts again: one rank alone cannot tell the others."""
        halved = self.engine.halve_micro_batch()
        if halved is None:
            return False
        self._fits = tokens = halved * self.study.data.context_tokens
        self.ledger.remember_micro_batch(self.gang, tokens)
        print(f"memory ran out; from now on {tokens} tokens at a time", flush=True)
        return self.engine.world_size == 1

    def latency(self) -> Latency | None:
        """What `predicted_ms` rests on, measured where the study has none yet, which is at its dense baseline: nothing else of
        it runs then. None where no candidate's time is asked for."""
        if not self.study.search.predicts_ms:
            return None
        model, ledger = self.study.model, self.ledger

        def measured() -> Latency:
            if (known := ledger.latency()) is None:
                known = measured_latency(model.path, getattr(torch, model.dtype), self.study.serving)
                ledger.write_twice("latency.json", known)
            return known

        return self.engine.from_rank_0(measured)

    def evaluate(self, split: str, race: Race | None = None) -> Evaluation:
        """Of the engine's current weights, on "selection" or "report"."""
        self.engine.model.eval()
        return evaluate(self.scorer, self.inputs.tasks[split], race=race)

    def race(self, size: int | None) -> tuple[Race | None, str | None]:
        """(the race of a candidate of this size, key of its rival, the best finished one that is no larger); without
        racing (None, None). With no size or no rival the items still come in the same parts, which rounding depends on.
        """
        study = self.study
        if study.evaluation.racing_level is None or not self.inputs.tasks["selection"]:
            return None, None
        level, is_up = study.evaluation.racing_level, higher_is_better(study.search.objective)
        key, rival = self.engine.from_rank_0(lambda: self._rival(size)) if size is not None else (None, np.empty(0))

        def is_lost(own: Items) -> bool:
            return key is not None and self.engine.from_rank_0(lambda: is_dominated(item_losses(own, is_up), rival, level))

        return Race(study.search.objective, study.data.seed, is_lost), key

    def same_race(self, record: RoundRecord) -> Race | None:
        """That scores a candidate on the items on which it was scored before."""
        race, _ = self.race(None)
        if race is None or record.dominated_by is None:
            return race
        num_items = record.metrics[race.objective].num_items
        return replace(race, is_lost=lambda own: len(own.item) >= num_items)

    def _rival(self, size: int) -> tuple[str | None, NDArray[np.float64]]:
        """(key, losses in `item_order`); (None, empty) also where the file of its items is gone."""
        objective = self.study.search.objective
        is_up = higher_is_better(objective)

        def quality(record: RoundRecord) -> float:
            return (1 if is_up else -1) * record.metrics[objective].value

        finished = [record for record in self.ledger.rounds().values()
                    if record.dominated_by is None and getattr(record, self.study.search.size) <= size]
        best = max(finished, key=quality, default=None)
        items = self.ledger.items(best.key, "selection") if best else None
        if best is None or items is None:
            return None, np.empty(0)
        return best.key, item_losses(in_item_order(items[objective], self.study.data.seed), is_up)


def lone_worker(ledger: Ledger, record: RoundRecord, what_fails: str) -> Worker:
    """A gang of one rank in this process, which computes as the one that made a candidate. ValueError where the files of the
    study's model, text or tasks are others now."""
    described = ledger.study()
    if not described.study.cluster.gpus_per_rank:
        os.environ["DS_ACCELERATOR"] = "cpu"
    inputs = same_inputs(described, f"candidate {record.key}: {what_fails}")
    return Worker(described.study.replaced(num_ranks=1, zero_stage=record.provenance.zero_stage or 0), ledger, inputs)
