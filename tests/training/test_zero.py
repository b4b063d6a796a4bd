"""DeepSpeed clips by our norm: that of all gradients, over all ranks."""

import sys
from pathlib import Path

import pytest
from ranks import answer, run_ranks


def test_gradients_are_clipped_by_the_norm_of_all(tiny_model: Path) -> None:
    for stage, (factor, wanted, of_kept) in run_ranks(__file__, 2, [str(tiny_model)]).items():
        assert factor == pytest.approx(wanted, rel=1e-3), stage
        assert wanted < of_kept / 1.1, stage


def measure(model: str, stage: int) -> tuple[float, float, float]:
    """(factor that the gradients were multiplied with, that of all of a plain model's gradients, of those of kept weights)."""
    import torch
    from transformers import AutoModelForCausalLM

    from raysearch.training.engine import Engine

    tokens = torch.randint(0, 257, (4, 32), generator=torch.Generator().manual_seed(0))
    norms = []
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    engine = Engine(model, prunable="matrices", zero_stage=stage, dtype="float32", batch_tokens=128, context_tokens=32,
                    weight_decay=0.1)
    keep = {name: torch.arange(torch.Size(shape).numel()).view(shape) % 10 == 0
            for name, shape in engine.shapes.items() if name in engine.prunable_names}
    engine.set_masks([keep[s.name].flatten()[s.start:s.start + s.values.numel()] if s.name in keep else None
                      for s in engine.shards])
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in keep:
                parameter.mul_(keep[name])
    plain(input_ids=tokens, labels=tokens).loss.backward()
    for kept_only in (False, True):
        gradients = [p.grad * keep[n] if n in keep and kept_only else p.grad for n, p in plain.named_parameters()]
        norms.append(min(1.0, 1 / float(torch.stack([g.norm() for g in gradients]).norm())))
    engine.restart(0.0)
    engine.train_step(tokens[engine.rank * 2:][:2], 1e-3)
    return float(engine.optimizer.clip_factor), *norms


if __name__ == "__main__":
    answer({stage: measure(sys.argv[1], stage) for stage in (0, 1, 2, 3)})
