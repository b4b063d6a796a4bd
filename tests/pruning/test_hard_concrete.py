"""Gates against their definition, one number at a time, and against what many samples say."""

import math

import torch

from raysearch.pruning.hard_concrete import BETA, HIGH, LOW, OPEN, open_probability, sample, settled


def test_a_sample_is_written_out() -> None:
    log_alpha = torch.tensor([-3.0, -0.5, 0.0, 0.7, 4.0])
    uniform = torch.tensor([0.5, 0.3, 0.5, 0.6, 0.2])
    gates, slopes = sample(log_alpha, uniform)
    for a, u, gate, slope in zip(log_alpha.tolist(), uniform.tolist(), gates.tolist(), slopes.tolist()):
        s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / BETA))
        stretched = s * (HIGH - LOW) + LOW
        assert abs(gate - min(1.0, max(0.0, stretched))) < 1e-6
        assert abs(slope - ((HIGH - LOW) / BETA * s * (1 - s) if 0 < stretched < 1 else 0.0)) < 1e-5
    assert gates[0] == 0  # exactly, as at the other end
    assert gates[-1] == 1


def test_the_slope_is_the_derivative() -> None:
    log_alpha = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.sigmoid((uniform.logit() + log_alpha) / BETA)
    (s * (HIGH - LOW) + LOW).clamp(0, 1).sum().backward()
    assert torch.allclose(sample(log_alpha.detach(), uniform)[1], log_alpha.grad)


def test_probabilities_are_those_of_many_samples() -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for a in (-2.0, 0.0, 1.0, OPEN):
        gates, _ = sample(torch.full_like(uniform, a), uniform)
        assert abs(float((gates > 0).float().mean()) - float(open_probability(torch.tensor(a)))) < 0.005
    gates, _ = sample(torch.full_like(uniform, OPEN), uniform)
    assert (round(float((gates == 1).float().mean()), 2), round(float((gates == 0).float().mean()), 2)) == (0.77, 0.06)


def test_a_gate_settles_without_chance() -> None:
    log_alpha = torch.tensor([-9.0, 0.0, 9.0])
    assert settled(log_alpha).tolist() == [0.0, 0.5, 1.0]
    assert not sample(log_alpha, torch.tensor([0.0, 1.0, 0.5]))[0].isnan().any()  # the ends of what may be drawn
