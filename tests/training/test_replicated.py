"""ZeRO-0's flat layout: the module's parameters are views of it, and a step is that of plain torch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysearch.training.replicated import ALIGNED, Replicated


@pytest.fixture(autouse=True)
def world() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def layout(model: nn.Module, **adamw: object) -> Replicated:
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    return Replicated(model, groups, 0.5, torch.device("cpu"), lr=0.1, **adamw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_views_that_begin_at_whole_vectors(dtype: torch.dtype) -> None:
    model, before = net(dtype), [p.detach().clone() for p in net(dtype).parameters()]
    flat = layout(model)
    for parameter, value in zip(model.parameters(), before):
        assert torch.equal(parameter, value)
        assert parameter.dtype == dtype
    offsets = [(parameter, offset, master.numel()) for master, parameter, _, _, offset in flat.pieces()]
    assert [offset % ALIGNED for _, offset, _ in offsets] == [0, 0, 0, 0]
    masters = {id(master): master for master, *_ in flat.pieces()}
    with torch.no_grad():
        for master in masters.values():
            master.fill_(2.0)
    flat.sync()
    assert all(bool((parameter == 2).all()) for parameter in model.parameters())


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_steps_are_those_of_torch(num_parts: int) -> None:
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)) * 5
    theirs = net()
    adamw = torch.optim.AdamW([{"params": [p for p in theirs.parameters() if p.dim() == 2], "weight_decay": 0.1},
                               {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0}], lr=0.1)
    ours = layout(net())
    for _ in range(3):
        loss = theirs(inputs).square().mean()
        adamw.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adamw.step()
        parts = inputs.split(8 // num_parts)
        mean = ours.train_step([lambda part=part: ours.forward(input=part).square().mean() for part in parts])
        assert float(mean) == pytest.approx(loss.item(), rel=1e-6)
        assert float(ours.optimizer.clip_factor) == pytest.approx(min(1.0, 0.5 / float(norm)), rel=1e-4)
    for mine, other in zip(ours.module.parameters(), theirs.parameters()):
        assert torch.allclose(mine, other, atol=1e-6)


def test_bf16_gradients_are_added_in_fp32() -> None:
    """256 + 1 is 256 in bf16: of 1 + 255 times 1/256 nothing but the first would stay."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    flat = Replicated(model, [{"params": list(model.parameters())}], 1e9, torch.device("cpu"), lr=0.0)
    seen: list[Tensor] = []
    flat.optimizer.step = lambda: seen.append(next(flat.pieces())[0].grad.clone())  # type: ignore[method-assign]
    scales = [1.0] + [1 / 256] * 255
    flat.train_step([lambda scale=scale: (model.weight * scale).sum() for scale in scales])
    assert float(seen[0][0]) == pytest.approx(sum(scales) / len(scales), rel=1e-6)


def test_a_checkpoint_goes_on_where_it_was(tmp_path: Path) -> None:
    inputs = torch.randn(8, 5).to(torch.bfloat16)

    def steps(flat: Replicated, number: int) -> None:
        for _ in range(number):
            flat.train_step([lambda: flat.forward(input=inputs).square().mean()])

    straight = layout(net(torch.bfloat16))
    steps(straight, 2)
    straight.save_checkpoint(str(tmp_path), 2)
    steps(straight, 3)
    other = layout(net(torch.bfloat16))
    steps(other, 1)
    assert other.load_checkpoint(str(tmp_path)) == 2
    steps(other, 3)
    for mine, wanted in zip(other.module.parameters(), straight.module.parameters()):
        assert torch.equal(mine, wanted)
