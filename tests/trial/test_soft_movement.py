"""Soft movement against plain torch: scores, their Adam, threshold and penalty written out."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysearch.config import Action
from raysearch.trial.pruner import Pruner
from raysearch.trial.round import dense_round, load_candidate
from raysearch.trial.worker import Worker

STEPS, THRESHOLD, RATE, PENALTY, LEARNING_RATE = 10, 0.45, 0.05, 300.0, 1e-3


@pytest.mark.parametrize("penalty", [0.0, PENALTY])
def test_a_round_is_written_out(worker: Worker, tiny_model: Path, penalty: float) -> None:
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    engine = worker.engine
    engine.restart(0.0)
    action = Action(criterion="soft_movement", threshold=THRESHOLD, score_rate=RATE, score_penalty=penalty,
                    mask_interval_steps=3)
    Pruner(engine, Action(sparsity=0.1), 0).begin()  # the parent's
    pruned = {p.name: ~engine.gather_mask(p.name) for p in engine.prunables}
    pruner = Pruner(engine, action, STEPS)
    pruner.begin()

    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    named = {name: p for name, p in model.named_parameters() if name in pruned}
    full = {name: torch.where(pruned[name], 0, p.detach()) for name, p in model.named_parameters() if name in pruned}
    full |= {name: p.detach().clone() for name, p in model.named_parameters() if name not in pruned}
    scores, first, second = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(3))
    mean, square = ({name: torch.zeros_like(p) for name, p in full.items()} for _ in range(2))
    masks = {name: ~each for name, each in pruned.items()}
    num_weights = sum(p.numel() for p in named.values())
    for step in range(1, STEPS + 1):
        tokens = worker.inputs.blocks.stream(4 * step, 4, 0)
        engine.train_step(tokens, LEARNING_RATE)
        pruner.after_step(step)

        for name, p in model.named_parameters():
            p.data = full[name] * masks[name] if name in masks else full[name].clone()
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        cut = THRESHOLD * (1 - (1 - max(0.0, (min(step, 7) - 1) / 6)) ** 3)
        clip = min(1.0, 1.0 / (float(torch.cat([g.flatten() for g in gradients.values()]).norm()) + 1e-6))
        for name in named:
            sigmoid = 1 / (1 + (-scores[name]).exp())
            slope = gradients[name] * full[name] + penalty * cut / THRESHOLD * sigmoid * (1 - sigmoid) / num_weights
            first[name], second[name] = 0.9 * first[name] + 0.1 * slope, 0.999 * second[name] + 0.001 * slope**2
            scores[name] -= RATE * (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
        for name, gradient in gradients.items():
            gradient = clip * (gradient * masks[name] if name in masks else gradient)
            mean[name], square[name] = 0.9 * mean[name] + 0.1 * gradient, 0.95 * square[name] + 0.05 * gradient**2
            update = LEARNING_RATE * (mean[name] / (1 - 0.9**step)) / ((square[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            full[name] = torch.where(masks[name], full[name] - update, full[name]) if name in masks else full[name] - update
        for name in named if step in (1, 4, 7) else ():
            now = (1 / (1 + (-scores[name]).exp()) > cut) & ~pruned[name]
            for moments in (mean, square):
                moments[name] = torch.where(now != masks[name], 0, moments[name])
            masks[name] = now

    differences = sum(int((engine.gather_mask(name) != mask).sum()) for name, mask in masks.items())
    assert differences <= 0.002 * num_weights  # Adam turns the rounding of tiny slopes into whole steps
    kept = sum(int(mask.sum()) for mask in masks.values()) / num_weights
    assert 0.05 < kept < 0.9
    for name, mask in masks.items():
        here, there = engine.gather(name), full[name] * mask
        assert torch.isclose(here, there, atol=1e-4).float().mean() > 0.995, name
        assert not here[pruned[name]].any()
    pruner.end()
    engine.restart(0.0)
