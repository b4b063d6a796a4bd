"""L0 gates against plain torch, where a gate is a factor in the graph. Stages and ranks: test_pruner.py."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysearch.config import Action
from raysearch.pruning.hard_concrete import BETA, HIGH, LOW, OPEN
from raysearch.trial.pruner import Pruner
from raysearch.trial.round import dense_round, load_candidate
from raysearch.trial.worker import Worker

STEPS, RATE, LEARNING_RATE = 10, 0.2, 1e-3


@pytest.mark.parametrize(("pattern", "penalty"), [("head", 0.0), ("head", 4.0), ("neuron", 4.0)])
def test_a_round_is_written_out(worker: Worker, tiny_model: Path, pattern: str, penalty: float) -> None:
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    engine = worker.engine
    engine.restart(0.0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    blocks = model.transformer.h
    readers = [block.attn.c_proj if pattern == "head" else block.mlp.c_proj for block in blocks]
    of_line = [torch.arange(2).repeat_interleave(16) + 2 * i if pattern == "head" else torch.arange(128) + 128 * i
               for i in range(2)]
    num = 4 if pattern == "head" else 256
    pruner = Pruner(engine, Action(criterion="l0", pattern=pattern, sparsity=0.5, score_rate=RATE, gate_penalty=penalty,
                                   mask_interval_steps=3, seed=5), STEPS)
    pruner.begin()

    draws = torch.Generator().manual_seed(5)
    log_alpha = torch.full((num,), OPEN, requires_grad=True)
    adam = torch.optim.Adam([log_alpha], lr=RATE)
    ahead = [(torch.rand(num, generator=draws), log_alpha.detach().clone()) for _ in range(2)]
    mean, square = ({name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(2))
    keep, is_settled = torch.ones(num, dtype=torch.bool), False
    for step in range(1, STEPS + 1):
        tokens = worker.inputs.blocks.stream(4 * step, 4, 0)
        engine.train_step(tokens, LEARNING_RATE)
        pruner.after_step(step)

        model.zero_grad()
        gate = torch.ones(num)
        if not is_settled:
            uniform, then = ahead.pop(0)  # sampled before the last step taught it anything
            learned = then.clone().requires_grad_()
            s = torch.sigmoid(((uniform / (1 - uniform)).log() + learned) / BETA)
            gate = (s * (HIGH - LOW) + LOW).clamp(0, 1)
        hooks = [reader.register_forward_pre_hook(lambda _, x, of=of, gate=gate: (x[0] * gate[of],))
                 for reader, of in zip(readers, of_line)]
        model(input_ids=tokens, labels=tokens).loss.backward()
        for hook in hooks:
            hook.remove()
        grads = {name: p.grad for name, p in model.named_parameters()}
        clip = float(engine.optimizer.clip_factor)  # by the norm of the gradients of w z, which a closed gate hides here
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = clip * grads[name]
                mean[name], square[name] = 0.9 * mean[name] + 0.1 * g, 0.95 * square[name] + 0.05 * g**2
                p -= LEARNING_RATE * (mean[name] / (1 - 0.9**step)) / ((square[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            mask_units(model, pattern, keep)
        if is_settled:
            continue
        opens = torch.sigmoid(log_alpha - BETA * torch.log(torch.tensor(-LOW / HIGH)))
        (penalty * opens.mean()).backward()
        log_alpha.grad = learned.grad + (0 if log_alpha.grad is None else log_alpha.grad)
        adam.step()
        log_alpha.grad = None
        ahead.append((torch.rand(num, generator=draws), log_alpha.detach().clone()))
        if step in (1, 4, 7):
            gone = 0.5 * (1 - (1 - (min(step, 7) - 1) / 6) ** 3)
            order = log_alpha.detach().argsort(stable=True)
            keep = torch.ones(num, dtype=torch.bool)
            keep[order[:int(gone * num + 0.5)]] = False
            mask_units(model, pattern, keep)
        if step == 7:
            is_settled = True
            settled = (torch.sigmoid(log_alpha.detach()) * (HIGH - LOW) + LOW).clamp(0, 1)
            with torch.no_grad():
                for reader, of in zip(readers, of_line):
                    reader.weight *= settled[of][:, None]

    found = {name: engine.gather(name) for name, _ in model.named_parameters()}
    far = {name: int((~torch.isclose(found[name], p.detach(), atol=2e-4)).sum()) for name, p in model.named_parameters()}
    assert sum(far.values()) <= 40, far  # keys' biases have no gradient, and Adam makes steps of its rounding
    read = "attn.c_proj.weight" if pattern == "head" else "mlp.c_proj.weight"
    num_gone = sum(int((weights == 0).all(1).sum()) for name, weights in found.items() if name.endswith(read))
    assert num_gone >= (32 if pattern == "head" else 128)
    pruner.end()
    assert engine.optimizer.units is None
    engine.restart(0.0)


@torch.no_grad()
def mask_units(model: torch.nn.Module, pattern: str, keep: torch.Tensor) -> None:
    for block, stays in zip(model.transformer.h, keep.float().split(len(keep) // 2)):
        if pattern == "head":
            lines = stays.repeat_interleave(16)
            block.attn.c_proj.weight *= lines[:, None]
            block.attn.c_attn.weight *= lines.repeat(3)
            block.attn.c_attn.bias *= lines.repeat(3)
        else:
            block.mlp.c_proj.weight *= stays[:, None]
            block.mlp.c_fc.weight *= stays
            block.mlp.c_fc.bias *= stays
