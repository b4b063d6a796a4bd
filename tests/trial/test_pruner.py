"""The pruner on real engines: one suite for every criterion and pattern, on ZeRO 0 to 3, one and two ranks; gradual rounds
against three nested loops; heads against a model whose heads were cut by hand."""

import functools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import answer, run_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM

from raysearch.config import Action
from raysearch.study.records import RoundRecord
from raysearch.training.data import Blocks
from raysearch.trial.pruner import Pruner
from raysearch.trial.round import dense_round, load_candidate, run_round, train_candidate
from raysearch.trial.worker import Worker

STAGES = (0, 1, 2, 3)
COMBINATIONS = [(criterion, pattern, scope)
                for criterion in ("magnitude", "gradual_magnitude", "sr_ste", "movement", "magnitude_times_age")
                for pattern in ("unstructured", "head", "row_pairs") for scope in ("global", "layer", "row")
                if pattern == "unstructured" or scope != "row"]
COMBINATIONS += [(criterion, pattern, scope) for criterion, pattern in
                 (("magnitude", "neuron"), ("l2", "neuron"), ("movement", "neuron"), ("sr_ste", "neuron"), ("l2", "head"))
                 for scope in ("global", "layer")]
COMBINATIONS += [(criterion, pattern, scope) for criterion, pattern in
                 (("magnitude", "block"), ("movement", "block"), ("l2", "block"), ("movement", "hybrid"), ("sr_ste", "hybrid"))
                 for scope in ("global", "layer")]
COMBINATIONS += [(criterion, "layer", "global") for criterion in ("magnitude", "movement", "top", "symmetric")]
COMBINATIONS += [(criterion, pattern, "global") for criterion in ("magnitude", "gradual_magnitude", "sr_ste", "movement")
                 for pattern in ("2:4", "3:5")]
IN_THE_ROUND = ("movement", "gradual_magnitude", "sr_ste", "rigl", "set")
CALIBRATED = ("wanda", "ria")
BY_TEXT = (*CALIBRATED, "magnitude")  # whose budget looks at it
CALIBRATION = Blocks(Path("made up"), "")
vars(CALIBRATION)["tokens"] = np.arange(8 * 32, dtype=np.uint16).reshape(8, 32) * 37 % 257


@pytest.fixture(scope="module")
def measured(tiny_model: Path) -> dict[int, dict[str, Any]]:
    """World size -> what the ranks found."""
    return {world_size: run_ranks(__file__, world_size, [str(tiny_model), *map(str, STAGES)]) for world_size in (1, 2)}


@pytest.fixture(scope="module")
def on_the_cpu(tiny_model: Path) -> dict[str, Any]:
    """What one rank found; every stage finds the same, as the tests of `measured` show."""
    return run_ranks(__file__, 1, [str(tiny_model), "0"])["0"]


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gpu_makes_the_masks_of_the_cpu(on_the_cpu: dict, tiny_model: Path, world_size: int) -> None:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    found = run_ranks(__file__, world_size, [str(tiny_model), "0", "3"], on_gpus=True)
    for stage, case in found.items():
        for name, masks in on_the_cpu["masks"].items():
            assert case["masks"][name]["sha256"] == masks["sha256"], (stage, name)
        assert case["come_back"] == {"values": True, "moments": True}
        kept, wanted = case["movement"]["num_kept"], on_the_cpu["movement"]["num_kept"]
        assert sum(abs(kept[name] - num) for name, num in wanted.items()) <= 20  # sums on a GPU round otherwise
        assert case["heads"]["pruned"] == on_the_cpu["heads"]["pruned"]


@pytest.mark.parametrize(("criterion", "pattern", "scope"), COMBINATIONS)
def test_masks_are_the_same_for_every_stage_and_world_size(measured: dict, criterion: str, pattern: str, scope: str) -> None:
    name = f"{criterion}/{pattern}/{scope}"
    masks = {case["masks"][name]["sha256"] for by_stage in measured.values() for case in by_stage.values()}
    assert len(masks) == 1


@pytest.mark.parametrize(("criterion", "pattern", "scope"), COMBINATIONS)
def test_sparsity_is_met_and_nothing_pruned_comes_back(measured: dict, criterion: str, pattern: str, scope: str) -> None:
    for by_stage in measured.values():
        for case in by_stage.values():
            found = case["masks"][f"{criterion}/{pattern}/{scope}"]
            assert found["sparsity"] == pytest.approx(found["wanted"], abs=found["tolerance"])
            assert found["num_revived"] == 0


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("criterion", IN_THE_ROUND)
def test_a_gradual_round_is_three_nested_loops(measured: dict, tiny_model: Path, world_size: int, stage: int,
                                               criterion: str) -> None:
    case = measured[world_size][str(stage)][criterion]
    scores, masks, weights = by_hand(tiny_model, criterion)
    for name, gathered in case["scores"].items():
        assert torch.allclose(torch.tensor(gathered), scores[name][:50], rtol=2e-3, atol=1e-6), name
    differences = sum(abs(case["num_kept"][name] - int(mask.sum())) for name, mask in masks.items())
    assert differences <= 4  # of near ties, where one rounding decides
    for name, wanted in weights.items():
        assert torch.allclose(torch.tensor(case["weights"][name]), wanted[:50], atol=2e-4), name
    assert case["zeros_of_the_module"] == sum(int((~mask).sum()) for mask in masks.values()) or differences


@pytest.mark.parametrize("criterion", BY_TEXT)
def test_calibrated_masks_are_the_same_for_every_stage_and_world_size(measured: dict, criterion: str) -> None:
    """A sequence is looked at alone, so that only the order of adding in fp64 differs."""
    for name in measured[1]["0"]["calibrated"][criterion]:
        found = {case["calibrated"][criterion][name]["sha256"] for by_stage in measured.values() for case in by_stage.values()}
        assert len(found) == 1, name
        assert not any(case["calibrated"][criterion][name]["num_revived"] for by_stage in measured.values()
                       for case in by_stage.values())


@pytest.mark.parametrize("criterion", CALIBRATED)
def test_calibrated_pruning_is_the_whole_model_again_for_each_block(measured: dict, tiny_model: Path, criterion: str) -> None:
    """By hand: hooks on one block, the whole model with what was pruned before, each output's lowest scores in a loop."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = CALIBRATION.stream(0, 3, 0)
    for block in model.transformer.h:
        norms = {}
        modules = [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
        hooks = [module.register_forward_pre_hook(lambda module, x, norms=norms: norms.__setitem__(
            module, x[0].flatten(0, 1).norm(dim=0))) for module in modules]
        with torch.no_grad():
            model(input_ids=tokens)
        for hook in hooks:
            hook.remove()
        for module in modules:
            size = module.weight.data.abs()  # [inputs, outputs]
            relative = size / size.sum(1, keepdim=True) + size / size.sum(0)
            scores = (size * norms[module][:, None] if criterion == "wanda" else relative * norms[module][:, None].sqrt())
            for output in range(size.shape[1]):
                lowest = scores[:, output].argsort(stable=True)[:int(0.55 * len(size) + 0.5)]
                module.weight.data[lowest, output] = 0
    case = measured[2]["3"]["calibrated"][criterion]["row"]
    for name, weights in case["weights"].items():
        assert torch.equal(torch.tensor(weights) == 0, dict(model.named_parameters())[name].flatten()[:2000] == 0), name


def test_sparsegpt_is_the_same_for_every_stage_and_world_size(measured: dict) -> None:
    """But for the order of adding in fp32: of 24,576 weights at most one in a hundred is another near tie's."""
    for name in ("layer", "2:4"):
        cases = [case["calibrated"]["sparsegpt"][name] for by_stage in measured.values() for case in by_stage.values()]
        assert not any(case["num_revived"] for case in cases)
        for parameter, weights in cases[0]["weights"].items():
            for case in cases[1:]:
                far = ~torch.isclose(torch.tensor(case["weights"][parameter]), torch.tensor(weights), atol=1e-3)
                assert far.float().mean() < 0.01, (name, parameter)


def test_distillation_follows_the_dense_model(measured: dict, tiny_model: Path) -> None:
    """By hand, with a half of each layer pruned; and the dense model has nothing to learn from itself."""
    dense, model = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    for name, p in model.named_parameters():
        if ".h." in name and p.ndim == 2:
            p.data[p.abs() <= p.abs().flatten().kthvalue(p.numel() // 2).values] = 0
    tokens = next(batches())
    found, wanted = ((each(input_ids=tokens).logits[:, :-1] / 2).log_softmax(-1) for each in (model, dense))
    apart = 4 * (wanted.exp() * (wanted - found)).sum(-1).mean()
    loss = 0.4 * model(input_ids=tokens, labels=tokens).loss + 0.6 * apart
    states = [each(input_ids=tokens, output_hidden_states=True).hidden_states[1:] for each in (model, dense)]
    for here, there in zip(*states):
        loss = loss + 0.3 * (here - there).square().mean() / there.square().mean()
    cases = [case["distilled"] for by_stage in measured.values() for case in by_stage.values()]
    for case in cases:
        assert case["losses"][0] == pytest.approx(loss.item(), rel=1e-3)
        assert case["losses"] == pytest.approx(cases[0]["losses"], rel=1e-3)
        assert case["losses"][2] < case["losses"][0]
        assert case["of_itself"] == pytest.approx(0, abs=1e-6)
        assert case["num_revived"] == 0


@pytest.mark.parametrize("criterion", ["rigl", "set"])
def test_drop_and_grow_is_the_same_for_every_stage_and_world_size(measured: dict, criterion: str) -> None:
    cases = [case["moved"][criterion] for by_stage in measured.values() for case in by_stage.values()]
    for case in cases:
        assert case == cases[0]
        assert case["kept_as_many"]
        assert case["num_grown"] > 1000
        assert case["num_not_at_0"] == 0


def test_taylor_is_the_same_for_every_stage_and_world_size(measured: dict) -> None:
    """But for the rounding of gradients in fp32: single weights near ties."""
    cases = [case["taylor"] for by_stage in measured.values() for case in by_stage.values()]
    first = np.unpackbits(np.frombuffer(bytes.fromhex(cases[0]["unstructured"]), np.uint8))
    assert abs(float(first.mean()) - 0.5) < 1e-3
    for case in cases:
        assert case["head"] == cases[0]["head"]
        assert case["layer"] == cases[0]["layer"]
        assert case["contributions"] == pytest.approx(cases[0]["contributions"], abs=1e-6)
        for pattern in ("head", "neuron"):
            name = f"{pattern} by activation"
            assert case[name] == pytest.approx(cases[0][name], rel=1e-5)
            assert case[f"kept by activation, {pattern}"] == cases[0][f"kept by activation, {pattern}"]
        apart = [np.frombuffer(bytes.fromhex(each["neuron"]), np.uint8) for each in (case, cases[0])]
        assert int(np.unpackbits(apart[0] ^ apart[1]).sum()) <= 2 * 2 * 32 + 2  # a near tie: one neuron goes for another
        assert int((np.unpackbits(np.frombuffer(bytes.fromhex(case["unstructured"]), np.uint8)) != first).sum()) <= 8


def test_soft_movement_keeps_as_many_for_every_stage_and_world_size(measured: dict) -> None:
    """But for Adam's first steps, whose size a rounding of the smallest gradients decides."""
    cases = [case["soft"] for by_stage in measured.values() for case in by_stage.values()]
    assert {case["num_revived"] for case in cases} == {0}
    kept = [case["num_kept"] for case in cases]
    assert min(kept) > 1000
    assert max(kept) < 0.75 * 24576
    assert max(kept) - min(kept) <= 0.002 * 24576


def test_layer_drop_and_vectors_alone_are_the_same_for_every_stage_and_world_size(measured: dict) -> None:
    cases = [case["at_layers"] for by_stage in measured.values() for case in by_stage.values()]
    for case in cases:
        assert case["losses"] == pytest.approx(cases[0]["losses"], rel=1e-3)
        assert case["weights"] == pytest.approx(cases[0]["weights"], abs=5e-4)
        assert case["num_zeros"] == 0  # all layers are back
        assert case["changed"] == cases[0]["changed"]
        assert not any(name.endswith(("attn.weight", "proj.weight", "fc.weight", "te.weight")) for name in case["changed"])
        assert len(case["changed"]) == 2 * 8 + 2
    assert len({round(loss, 3) for loss in cases[0]["losses"]}) == len(cases[0]["losses"])


def test_gates_and_group_lasso_are_the_same_for_every_stage_and_world_size(measured: dict) -> None:
    """Draws and sums over units are; a near tie is one neuron for another."""
    cases = [case["at_units"] for by_stage in measured.values() for case in by_stage.values()]
    for case in cases:
        assert case["head"] == cases[0]["head"]
        apart = [np.frombuffer(bytes.fromhex(each["neuron"]), np.uint8) for each in (case, cases[0])]
        assert int(np.unpackbits(apart[0] ^ apart[1]).sum()) <= 2 * 2 * 32
        assert case["log_alpha"] == pytest.approx(cases[0]["log_alpha"], abs=2e-3)
        assert case["num_revived"] == 0
        assert case["units_at_0"] == cases[0]["units_at_0"]
        assert 20 < len(case["units_at_0"]) < 236


def test_latents_come_back(measured: dict) -> None:
    for by_stage in measured.values():
        for case in by_stage.values():
            assert case["come_back"] == {"values": True, "moments": True}


def test_masked_heads_are_heads_that_were_cut_by_hand(measured: dict, tiny_model: Path) -> None:
    case = measured[2]["3"]["heads"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = torch.arange(40).view(2, 20)
    for layer, head in case["pruned"]:
        attention = model.transformer.h[layer].attn
        size = attention.head_dim
        rows = torch.cat([torch.arange(size) + third * model.config.n_embd + head * size for third in range(3)])
        with torch.no_grad():
            attention.c_attn.weight[:, rows] = 0
            attention.c_attn.bias[rows] = 0
            attention.c_proj.weight[head * size:(head + 1) * size] = 0
    assert torch.allclose(torch.tensor(case["logits"]), model(tokens).logits[:, -1, :20], atol=1e-5)
    assert all(case["heads"]["shrunk"] for by_stage in measured.values() for case in by_stage.values())  # L1: no bias, no norm
    gone = 4 * 2 * (4 * 32 * 16 + 3 * 16)  # bytes of one head's matrices and biases in each of two layers
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert {tuple(case["heads"]["sizes"]) for by_stage in measured.values() for case in by_stage.values()} == {
        (whole - gone, whole - gone, (whole - gone) // 4, None)}
    assert len(case["pruned"]) == 2  # half of two heads in each of two layers


@pytest.mark.parametrize(("criterion", "power"), [("l2", 2), ("magnitude", 1)])
@pytest.mark.parametrize("pattern", ["neuron", "block"])
def test_units_go_by_the_mean_over_their_weights(worker: Worker, criterion: str, power: int, pattern: str) -> None:
    """Of l2, so, by their norm. By hand: a neuron is a column of the first matrix and a row of the second, a block 32 x 32."""
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    engine, first = worker.engine, "transformer.h.{}.mlp.c_fc.weight"
    engine.restart(0.0)
    size = {p.name: engine.gather(p.name).abs() ** power for p in engine.prunables}
    scope = "layer" if pattern == "neuron" else "global"
    Pruner(engine, Action(criterion=criterion, pattern=pattern, scope=scope, sparsity=0.5), 0).begin()
    if pattern == "neuron":
        for block in range(2):
            name = first.format(block)
            of_unit = size[name].sum(0) + size[name.replace("c_fc", "c_proj")].sum(1)
            gone = of_unit.argsort()[:64]
            assert (~engine.gather_mask(name)).all(0).nonzero().view(-1).tolist() == sorted(gone.tolist())
        return
    blocks = [(float(part.mean()), name, row, column) for name, whole in size.items()
              for row, rows in enumerate(whole.split(32)) for column, part in enumerate(rows.split(32, dim=1))]
    for rank, (_, name, row, column) in enumerate(sorted(blocks)):
        mask = engine.gather_mask(name).view(size[name].shape).split(32)[row].split(32, dim=1)[column]
        assert mask.any() == mask.all() == (rank >= len(blocks) // 2)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_round_that_diverged_leaves_nothing_behind_its_masks(worker: Worker, depth: int) -> None:
    record = dense_round(worker)
    if depth:
        record = run_round(worker, record, Action(sparsity=0.3))
    load_candidate(worker, record)
    before = {name: worker.engine.gather(name) for name in worker.engine.shapes}
    worker.loaded_key = None
    pruner = Pruner(worker.engine, Action(criterion="movement", sparsity=0.8, mask_interval_steps=1), 2)
    worker.engine.restart(0.0)
    pruner.begin()
    worker.engine.train_step(torch.arange(32 * worker.engine.sequences_per_rank).view(-1, 32) % 50, 0.001)
    pruner.after_step(1)  # and then the loss is NaN, and `end` never comes
    load_candidate(worker, record)
    for name, weights in before.items():
        assert torch.equal(worker.engine.gather(name), weights), name


@pytest.mark.parametrize("criterion", ["movement", "sr_ste"])
def test_a_head_that_comes_back_has_its_weights_and_its_biases(worker: Worker, criterion: str) -> None:
    load_candidate(worker, dense_round(worker))
    worker.loaded_key = None
    engine = worker.engine
    engine.restart(0.0)
    output, bias, other = (f"transformer.h.0.{name}" for name in ("attn.c_proj.weight", "attn.c_attn.bias", "mlp.c_fc.bias"))
    Pruner(engine, Action(sparsity=0.01), 0).begin()
    before = {name: engine.gather(name).clone() for name in engine.shapes}
    assert before[bias].all()
    action = Action(criterion=criterion, pattern="head", scope="layer", sparsity=0.5, mask_interval_steps=1, mask_decay=0.0)
    pruner = Pruner(engine, action, 10)
    pruner.begin()

    def rank_first(head: int) -> None:
        """The other heads go."""
        for shard in engine.prunable_shards:
            if criterion == "movement":
                shard.of(engine.optimizer.gathered).fill_(0.0)
        if criterion == "movement":
            for shard in engine.prunable_shards:
                if shard.name == output:
                    shard.of(engine.optimizer.gathered).view(2, -1)[head] = 1.0
            return
        for shard in engine.prunable_shards:  # its weights, wherever they are by now
            if shard.name == output:
                for values in (shard.values, shard.of(engine.optimizer.latents)):
                    values.view(2, -1)[head].mul_(1e3)
                    values.view(2, -1)[1 - head].mul_(1e-3)

    def columns(name: str, head: int) -> Tensor:
        return engine.gather(name).view(3, 2, -1)[:, head]

    rank_first(0)
    pruner.after_step(7)
    assert not columns(bias, 1).any()
    assert torch.equal(columns(bias, 0), before[bias].view(3, 2, -1)[:, 0])
    rank_first(1)
    rank_first(1)
    pruner.after_step(7)
    assert not columns(bias, 0).any()
    assert torch.equal(columns(bias, 1), before[bias].view(3, 2, -1)[:, 1])
    assert torch.equal(engine.gather(other), before[other])
    if criterion == "movement":
        fused = "transformer.h.0.attn.c_attn.weight"
        assert torch.equal(engine.gather(fused).view(-1, 3, 2, 16)[:, :, 1], before[fused].view(-1, 3, 2, 16)[:, :, 1])
    for step in range(8, 11):  # and nothing comes back to what stays pruned
        engine.train_step(torch.arange(64 * engine.sequences_per_rank).view(-1, 64) % 50, 1e-3)
        pruner.after_step(step)
    pruner.end()
    assert not columns(bias, 0).any()
    assert columns(bias, 1).all()
    engine.restart(0.0)


@pytest.mark.parametrize("pattern", ["head", "neuron", "layer", "hybrid"])
@pytest.mark.parametrize("criterion", ["movement", "sr_ste"])
def test_units_go_while_a_dense_model_trains_and_their_biases_with_them(apart: Worker, criterion: str, pattern: str) -> None:
    """Its biases have no masks as the round begins."""
    action = Action(criterion=criterion, pattern=pattern, sparsity=0.5, mask_interval_steps=1, mask_decay=1e-3,
                    learning_rate=1e-3, finetune_tokens=2560)
    record = run_round(apart, dense_round(apart), action)
    load_candidate(apart, record)
    engine = apart.engine
    dead = {name: ~mask for name in engine.shapes if (mask := engine.gather_mask(name)) is not None and not mask.all()}
    assert any(name.endswith(".bias") for name in dead)
    assert not any(engine.gather(name)[where].any() for name, where in dead.items())
    assert record.sparsity > 0.1


@pytest.mark.parametrize("fields", [
    {"criterion": "sr_ste", "mask_decay": 0.1}, {"criterion": "movement"}, {"criterion": "rigl", "drop_fraction": 0.3},
    {"criterion": "taylor", "calibration_sequences": 2}, {"criterion": "gradual_magnitude", "pattern": "2:4"},
    {"criterion": "magnitude", "distill_alpha": 0.5, "distill_hidden": 0.5},
    {"criterion": "sparsegpt", "calibration_sequences": 2},
    {"criterion": "set", "drop_fraction": 0.3, "scope": "layer", "budget": "owl", "owl_lambda": 0.1, "owl_m": 3.0,
     "calibration_sequences": 2},
    {"criterion": "soft_movement", "sparsity": None, "threshold": 0.45, "score_rate": 0.05, "score_penalty": 300.0},
], ids=lambda fields: fields["criterion"])
def test_a_round_that_was_killed_gives_the_same_candidate_when_it_runs_again(
        worker: Worker, fields: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, after_step = dense_round(worker), Pruner.after_step
    action = Action(**{"sparsity": 0.5, "finetune_tokens": 2560, "learning_rate": 1e-3, "mask_interval_steps": 2, **fields})

    def weights() -> dict[str, Tensor]:
        train_candidate(worker, dense, action)
        return {name: worker.engine.gather(name).clone() for name in worker.engine.shapes}

    def killed(pruner: Pruner, step: int) -> None:
        after_step(pruner, step)
        if step == 5:
            raise KeyboardInterrupt

    wanted = weights()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pruner, "after_step", killed)
        weights()
    for name, again in weights().items():
        assert torch.equal(again, wanted[name]), name
    record = run_round(worker, dense, action)
    assert record.sparsity == pytest.approx(0.5, abs=1e-3) or (action.threshold and 0.1 < record.sparsity < 0.95)
    load_candidate(worker, dense)
    load_candidate(worker, record)  # from its file
    for name, kept in wanted.items():
        assert torch.equal(worker.engine.gather(name), kept), name


def test_scopes_cut_where_they_say(worker: Worker) -> None:
    def by_layer(scope: str) -> RoundRecord:
        return run_round(worker, dense_round(worker), Action(sparsity=0.35, scope=scope))

    for scope, spread in (("layer", 0.001), ("row", 0.02)):
        values = by_layer(scope).layer_sparsity.values()
        assert max(values) - min(values) < spread, scope
    assert max(by_layer("global").layer_sparsity.values()) - min(by_layer("global").layer_sparsity.values()) > 0.001
    for scope in ("layer", "row"):
        record = run_round(worker, dense_round(worker), Action(sparsity=0.35, scope=scope, budget="erdos_renyi"))
        of_layer = record.layer_sparsity
        density = {name: (1 - of_layer[name]) * math.prod(p.shape) / sum(p.shape)  # eps, of all but those that stay dense
                   for p in worker.engine.prunables for name in [p.name] if of_layer[name] > 0}
        assert max(density.values()) / min(density.values()) < 1.05, scope  # rows round
        assert record.sparsity == pytest.approx(0.35, abs=0.01)
        assert max(of_layer.values()) - min(of_layer.values()) > 0.2
    load_candidate(worker, by_layer("row"))
    weight = worker.engine.gather("transformer.h.0.mlp.c_fc.weight")  # Conv1D keeps [inputs, outputs]
    zeros = (weight == 0).sum(0)
    assert zeros.min() == zeros.max() == round(0.35 * weight.shape[0])


def test_n_of_m_is_met_exactly_and_on_the_way_the_lowest_of_those_go_that_are_to_go(worker: Worker) -> None:
    """By hand: in plain loops over each output's groups, then a sort of what is not among the two largest."""
    load_candidate(worker, dense_round(worker))
    weights = {p.name: p.rows(worker.engine.gather(p.name)) for p in worker.engine.prunables}
    goes = {}
    for name, rows in weights.items():
        goes[name] = torch.zeros_like(rows, dtype=torch.bool)
        for row, gone in zip(rows.abs().tolist(), goes[name]):
            for start in range(0, len(row), 4):
                gone[sorted(range(start, start + 4), key=row.__getitem__)[:2]] = True
    magnitudes = torch.cat([weights[name][goes[name]].abs() for name in weights]).sort().values
    cut = magnitudes[int(0.3 * sum(rows.numel() for rows in weights.values()) + 0.5) - 1]
    for sparsity, wanted in ((0.3, {name: goes[name] & (rows.abs() <= cut) for name, rows in weights.items()}), (0.5, goes)):
        load_candidate(worker, run_round(worker, dense_round(worker), Action(pattern="2:4", sparsity=sparsity)))
        for p in worker.engine.prunables:
            assert torch.equal(p.rows(worker.engine.gather(p.name)) == 0, wanted[p.name]), (sparsity, p.name)
            assert sparsity < 0.5 or wanted[p.name].sum() * 2 == wanted[p.name].numel()


# ---- by hand: plain torch, one process, no engine ----

STEPS, SPARSITY, INTERVAL, RATE, DECAY = 10, 0.5, 3, 1e-3, 1.0


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        yield torch.randint(0, 257, (4, 32), generator=generator)


@functools.cache
def by_hand(folder: Path, criterion: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(scores, masks, weights) after a gradual round: AdamW written out, latent weights and masks in dictionaries."""
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    prunable = [name for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    full = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = {name: torch.ones_like(full[name], dtype=torch.bool) for name in prunable}
    scores = {name: torch.zeros_like(full[name]) for name in prunable}
    first, second = ({name: torch.zeros_like(p) for name, p in full.items()} for _ in range(2))
    total = sum(full[name].numel() for name in prunable)
    moves, anywhere = criterion in ("rigl", "set"), torch.Generator().manual_seed(0)
    if moves:
        cut = torch.cat([full[name].flatten() for name in prunable]).abs().sort().values[int(SPARSITY * total + 0.5) - 1]
        masks = {name: full[name].abs() > cut for name in prunable}
    for step, tokens in enumerate(batches(), start=1):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(full[name] * masks[name] if name in masks else full[name])
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        clip = min(1.0, 1.0 / (norm + 1e-6))
        for name, gradient in gradients.items():
            if name in masks:
                scores[name] -= gradient * full[name]  # straight through the mask, before clipping
                gradient = gradient if criterion == "sr_ste" else gradient * masks[name]
            gradient = gradient * clip
            if criterion == "sr_ste" and name in masks:
                gradient = gradient + DECAY * min(1.0, (step - 1) / 7) * full[name] * ~masks[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            update = RATE * (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            is_held = name in masks and criterion != "sr_ste"
            full[name] = torch.where(masks[name], full[name] - update, full[name]) if is_held else full[name] - update
        for name in prunable if moves and step in (1, 4) else ():  # at 7 none moves
            size, growth = full[name].abs().flatten(), gradients[name].abs().flatten()
            if criterion == "set":
                growth = torch.rand(size.numel(), generator=anywhere)
            kept = int(masks[name].sum())
            num_moved = int(0.3 / 2 * (1 + math.cos(math.pi * step / 7)) * kept)
            stays = torch.zeros(size.numel(), dtype=torch.bool)
            stays[(size - 1e9 * ~masks[name].flatten()).argsort()[size.numel() - (kept - num_moved):]] = True
            now = stays.clone()
            now[(growth - 1e9 * stays).argsort()[size.numel() - num_moved:]] = True
            changed = now.view_as(masks[name]) != masks[name]
            full[name], masks[name] = torch.where(changed, 0, full[name]), now.view_as(masks[name])
            first[name], second[name] = torch.where(changed, 0, first[name]), torch.where(changed, 0, second[name])
        if step in (1, 4, 7) and not moves:  # 10 % and 70 % of 10 steps, and every third between
            p = (step - 1) / 6
            sparsity = SPARSITY - SPARSITY * (1 - p) ** 3 if step < 7 else SPARSITY
            if criterion == "gradual_magnitude":  # what is pruned is 0, for good
                full |= {name: full[name] * masks[name] for name in prunable}
            if criterion != "movement":
                scores = {name: full[name].abs() for name in prunable}
            flat = torch.cat([scores[name].flatten() for name in prunable])
            keep = torch.ones(total, dtype=torch.bool)
            keep[flat.argsort(stable=True)[:int(sparsity * total + 0.5)]] = False
            parts = keep.split([full[name].numel() for name in prunable])
            for name, part in zip(prunable, parts):
                changed = (part.view_as(masks[name]) != masks[name]) & torch.tensor(criterion != "sr_ste")
                masks[name] = part.view_as(masks[name])
                first[name] = torch.where(changed, 0, first[name])
                second[name] = torch.where(changed, 0, second[name])
    kept = {name: full[name] * masks[name] for name in prunable}
    return ({name: scores[name].flatten() for name in prunable}, masks, {name: kept[name].flatten() for name in prunable})


# ---- on the ranks ----


def made_up(name: str, start: int, num: int) -> Tensor:
    """What was "gathered" at flat indices start..: numbers that depend on the place alone, with ties."""
    index = torch.arange(start, start + num) + sum(map(ord, name))  # on the CPU, so that a GPU gets the same
    return ((index * 2654435761 % 4093) / 64).round() / 16 - 16


def most_of_a_group(rows: Tensor, size: int) -> int:
    return int(torch.nn.functional.pad(rows.int(), (0, -rows.shape[1] % size)).reshape(-1, size).sum(1).max())


def masks_of_all(engine: Any) -> dict[str, Any]:
    import hashlib

    from raysearch.config import Action
    from raysearch.models.architectures import layout
    from raysearch.pruning.patterns import PATTERNS, n_of_m
    from raysearch.trial.pruner import Pruner

    found = {}
    for criterion, pattern, scope in COMBINATIONS:
        engine.load_base()
        group = n_of_m(pattern)
        Pruner(engine, Action(sparsity=0.05 if group else 0.2), 0).begin()  # some are pruned already
        before = {p.name: engine.gather_mask(p.name).cpu() for p in engine.prunables}
        wanted = group.sparsity if group else 0.55
        action = Action(criterion=criterion, pattern=pattern, scope=scope, sparsity=wanted, mask_interval_steps=1)
        pruner = Pruner(engine, action, num_steps=10)
        pruner.begin()
        if pruner.criterion.gather is not None:
            for shard in engine.prunable_shards:
                shard.of(engine.optimizer.gathered).copy_(made_up(shard.name, shard.start, shard.values.numel()))
        pruner.after_step(7)
        pruner.end()
        engine.restart(0.0)
        after = {p.name: engine.gather_mask(p.name).cpu() for p in engine.prunables}
        digest, belongs = hashlib.sha256(), dict.fromkeys(after, torch.tensor(True))
        for mask in after.values():
            digest.update(mask.numpy().tobytes())
        tolerance = 0.02
        if group is not None:
            for p in engine.prunables:
                assert most_of_a_group(p.rows(after[p.name]), group.size) <= group.num_kept, p.name
            tolerance = 0.03  # ragged ends
        elif pattern != "unstructured":
            units = PATTERNS[pattern](layout(engine.model, engine.prunables))
            parts = {part.name: part for part in units.parts}
            belongs = {name: (parts[name].rows[:, None] + parts[name].columns >= 0) if name in parts else torch.tensor(False)
                       for name in after}
            tolerance = 0.13  # of four heads in all one is a quarter
        num = sum(int((belongs[name] & torch.ones_like(mask)).sum()) for name, mask in after.items())
        gone = sum(int((belongs[name] & ~mask).sum()) for name, mask in after.items())
        if pattern in PATTERNS and pattern != "unstructured":  # single weights of kept units were pruned before
            gone = sum(int((belongs[name] & ~mask).sum()) - int((belongs[name] & ~before[name] & ~mask).sum())
                       for name, mask in after.items())
            num = sum(int((belongs[name] & before[name]).sum()) for name in after)
        found[f"{criterion}/{pattern}/{scope}"] = {
            "sha256": digest.hexdigest(), "sparsity": gone / num, "wanted": wanted, "tolerance": tolerance,
            "num_revived": sum(int((mask & ~before[name]).sum()) for name, mask in after.items())}
    return found


def calibrated_rounds(engine: Any, criterion: str) -> dict[str, Any]:
    """With scope row where it can be, layer and 2:4; each is trained with afterwards, which must not bring anything back."""
    import hashlib

    from raysearch.config import Action
    from raysearch.trial.pruner import Pruner

    found = {}
    tokens = next(batches())[engine.rank * engine.sequences_per_rank:][:engine.sequences_per_rank]
    for name, fields in (("row", {"scope": "row", "sparsity": 0.55}), ("2:4", {"pattern": "2:4", "sparsity": 0.5}),
                         ("layer", {"scope": "layer", "sparsity": 0.55, "budget": "erdos_renyi"}),
                         ("owl", {"scope": "layer", "sparsity": 0.55, "budget": "owl", "owl_lambda": 0.1, "owl_m": 3.0})):
        if (criterion == "sparsegpt" and name in ("row", "owl")) or (criterion == "magnitude" and name != "owl"):
            continue
        engine.load_base()
        engine.restart(0.0)
        if name != "row":
            Pruner(engine, Action(sparsity=0.2), 0).begin()  # some are pruned already
        before = {p.name: engine.gather_mask(p.name).cpu() for p in engine.prunables}
        pruner = Pruner(engine, Action(criterion=criterion, calibration_sequences=3, **fields), 1, CALIBRATION)
        pruner.begin()
        digest = hashlib.sha256()
        for p in engine.prunables:
            digest.update(engine.gather_mask(p.name).cpu().numpy().tobytes())
        weights = {p.name: engine.gather(p.name).flatten()[:2000].tolist() for p in engine.prunables}
        engine.train_step(tokens, RATE)
        pruner.end()
        after = {p.name: engine.gather(p.name).cpu() != 0 for p in engine.prunables}
        found[name] = {"sha256": digest.hexdigest(), "weights": weights if name == "row" or criterion == "sparsegpt" else {},
                       "num_revived": sum(int((after[name] & ~mask).sum()) for name, mask in before.items())}
    return found


def distilled_round(engine: Any) -> dict[str, Any]:
    from raysearch.config import Action
    from raysearch.trial.pruner import Pruner

    tokens = next(batches())[engine.rank * engine.sequences_per_rank:][:engine.sequences_per_rank]
    engine.load_base()
    engine.restart(0.0, distill_alpha=1.0, temperature=1.0, distill_hidden=1.0)
    of_itself = engine.mean(engine.train_step(tokens, 0.0))
    Pruner(engine, Action(sparsity=0.5, scope="layer"), 0).begin()
    masks = {p.name: engine.gather_mask(p.name) for p in engine.prunables}
    engine.restart(0.0, distill_alpha=0.6, temperature=2.0, distill_hidden=0.3)
    losses = [engine.mean(engine.train_step(tokens, 3e-3)) for _ in range(3)]
    num_revived = sum(int((engine.gather(name)[~mask] != 0).sum()) for name, mask in masks.items())
    engine.restart(0.0)
    return {"losses": losses, "of_itself": of_itself, "num_revived": num_revived}


def gradual_round(engine: Any, criterion: str) -> dict[str, Any]:
    import deepspeed

    from raysearch.config import Action
    from raysearch.trial.pruner import Pruner

    engine.load_base()
    engine.restart(0.0)
    pruner = Pruner(engine, Action(criterion=criterion, sparsity=SPARSITY, mask_interval_steps=INTERVAL, mask_decay=DECAY,
                                   drop_fraction=0.3), STEPS)
    pruner.begin()
    for step, tokens in enumerate(batches(), start=1):
        mine = tokens[engine.rank * engine.sequences_per_rank:][:engine.sequences_per_rank]
        engine.train_step(mine, RATE)
        pruner.after_step(step)
    scores: dict[str, Any] = {}
    gathers = bool(engine.optimizer.gathered)
    for shard in engine.prunable_shards if gathers else ():
        whole = torch.zeros(torch.Size(engine.shapes[shard.name]).numel(), device=engine.device)
        whole[shard.start:shard.start + shard.values.numel()] = shard.of(engine.optimizer.gathered)
        scores[shard.name] = whole
    for p in engine.prunables if gathers else ():
        nothing = torch.zeros(torch.Size(p.shape).numel(), device=engine.device)
        scores[p.name] = engine.all_reduce(scores.get(p.name, nothing))[:50].tolist()
    pruner.end()
    names = [p.name for p in engine.prunables]
    with deepspeed.zero.GatheredParameters([engine.parameters[name] for name in names], enabled=engine.zero_stage == 3):
        zeros = sum(int((engine.parameters[name] == 0).sum()) for name in names)
    return {"scores": scores, "zeros_of_the_module": zeros,
            "num_kept": {name: int(engine.gather_mask(name).sum()) for name in names},
            "weights": {name: engine.gather(name).flatten()[:50].tolist() for name in names}}


def moved_masks(engine: Any, criterion: str) -> dict[str, Any]:
    """After one drop and grow, by made-up gradients; some weights of the parent are pruned, and may grow."""
    import hashlib

    from raysearch.config import Action
    from raysearch.trial.pruner import Pruner

    engine.load_base()
    engine.restart(0.0)
    Pruner(engine, Action(sparsity=0.3), 0).begin()
    action = Action(criterion=criterion, scope="layer", sparsity=0.6, mask_interval_steps=1, drop_fraction=0.4)
    pruner = Pruner(engine, action, 10)
    pruner.begin()
    before = {p.name: engine.gather_mask(p.name).cpu() for p in engine.prunables}
    for shard in engine.prunable_shards if criterion == "rigl" else ():
        shard.of(engine.optimizer.gathered).copy_(made_up(shard.name, shard.start, shard.values.numel()))
    pruner.after_step(1)
    after = {p.name: engine.gather_mask(p.name).cpu() for p in engine.prunables}
    values = {p.name: engine.gather(p.name).cpu() for p in engine.prunables}
    engine.restart(0.0)
    return {"sha256": hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in after.values())).hexdigest(),
            "kept_as_many": all(after[name].sum() == mask.sum() for name, mask in before.items()),
            "num_grown": sum(int((after[name] & ~mask).sum()) for name, mask in before.items()),
            "num_not_at_0": sum(int((values[name][after[name] & ~mask] != 0).sum()) for name, mask in before.items())}


def taylor_masks(engine: Any) -> dict[str, Any]:
    """Hexadecimal, in whole bytes; some weights of the parent are pruned."""
    from raysearch.config import Action
    from raysearch.trial.pruner import Pruner

    found = {}
    for pattern in ("unstructured", "head", "neuron"):
        engine.load_base()
        engine.restart(0.0, distill_alpha=1.0)
        Pruner(engine, Action(sparsity=0.2), 0).begin()
        before = {p.name: engine.gather_mask(p.name) for p in engine.prunables}
        action = Action(criterion="taylor", pattern=pattern, scope="layer", sparsity=0.5, calibration_sequences=3)
        Pruner(engine, action, 0, CALIBRATION).begin()
        masks = {name: engine.gather_mask(name) for name in before}
        assert not any((masks[name] & ~mask).any() for name, mask in before.items())
        found[pattern] = np.packbits(torch.cat([mask.cpu().flatten() for mask in masks.values()]).numpy()).tobytes().hex()
    for pattern in ("head", "neuron"):
        engine.load_base()
        action = Action(criterion="activation", pattern=pattern, sparsity=0.5, calibration_sequences=3)
        pruner = Pruner(engine, action, 0, CALIBRATION)
        pruner.begin()
        found[f"{pattern} by activation"] = pruner._of_units.tolist()
        found[f"kept by activation, {pattern}"] = [int(engine.gather_mask(p.name).sum()) for p in engine.prunables]
    engine.load_base()
    action = Action(criterion="contribution", pattern="layer", sparsity=0.5, calibration_sequences=3)
    pruner = Pruner(engine, action, 0, CALIBRATION)
    pruner.begin()
    found["contributions"] = pruner._of_units.tolist()
    found["layer"] = str([int(engine.gather_mask(p.name).sum()) for p in engine.prunables])
    engine.restart(0.0)
    return found


def soft_round(engine: Any) -> dict[str, Any]:
    from raysearch.config import Action
    from raysearch.trial.pruner import Pruner

    engine.load_base()
    engine.restart(0.0)
    Pruner(engine, Action(sparsity=0.2), 0).begin()
    before = {p.name: engine.gather_mask(p.name) for p in engine.prunables}
    action = Action(criterion="soft_movement", threshold=0.45, score_rate=0.05, score_penalty=300.0, mask_interval_steps=3)
    pruner = Pruner(engine, action, STEPS)
    pruner.begin()
    for step, tokens in enumerate(batches(), start=1):
        engine.train_step(tokens[engine.rank * engine.sequences_per_rank:][:engine.sequences_per_rank], RATE)
        pruner.after_step(step)
    pruner.end()
    engine.restart(0.0)
    after = {name: engine.gather_mask(name) for name in before}
    return {"num_kept": sum(int(mask.sum()) for mask in after.values()),
            "num_revived": sum(int((after[name] & ~mask).sum()) for name, mask in before.items())}


def at_units(engine: Any) -> dict[str, Any]:
    """What acts on whole units in every step: gates, hexadecimal masks; and the neurons that group lasso brought to 0."""
    from raysearch.config import Action
    from raysearch.trial.pruner import Pruner

    found: dict[str, Any] = {"num_revived": 0}
    for pattern in ("head", "neuron"):
        engine.load_base()
        engine.restart(0.0)
        Pruner(engine, Action(sparsity=0.2), 0).begin()
        before = {p.name: engine.gather_mask(p.name) for p in engine.prunables}
        action = Action(criterion="l0", pattern=pattern, scope="layer", sparsity=0.5, score_rate=0.1, gate_penalty=2.0,
                        mask_interval_steps=2, seed=3)
        pruner = Pruner(engine, action, STEPS)
        pruner.begin()
        for step, tokens in enumerate(batches(), start=1):
            engine.train_step(tokens[engine.rank * engine.sequences_per_rank:][:engine.sequences_per_rank], RATE)
            pruner.after_step(step)
        found["log_alpha"] = pruner._by_itself.log_alpha.tolist()[:4]
        pruner.end()
        engine.restart(0.0)
        masks = {name: engine.gather_mask(name) for name in before}
        found["num_revived"] += sum(int((masks[name] & ~mask).sum()) for name, mask in before.items())
        found[pattern] = np.packbits(torch.cat([mask.cpu().flatten() for mask in masks.values()]).numpy()).tobytes().hex()
    engine.load_base()
    engine.restart(0.0)
    Pruner(engine, Action(pattern="neuron", sparsity=0.0, group_lambda=0.028 / RATE), STEPS).begin()
    for tokens in [*batches()][:2]:
        engine.train_step(tokens[engine.rank * engine.sequences_per_rank:][:engine.sequences_per_rank], RATE)
    readers = [engine.gather(f"transformer.h.{layer}.mlp.c_proj.weight") for layer in range(2)]
    found["units_at_0"] = (torch.cat(readers) == 0).all(1).nonzero().flatten().tolist()
    engine.restart(0.0)
    return found


def at_layers(engine: Any) -> dict[str, Any]:
    from raysearch.config import Action
    from raysearch.trial.pruner import Pruner

    def mine(tokens: Tensor) -> Tensor:
        return tokens[engine.rank * engine.sequences_per_rank:][:engine.sequences_per_rank]

    engine.load_base()
    engine.restart(0.0)
    pruner, losses = Pruner(engine, Action(sparsity=0.0, layer_drop=0.5, finetune_tokens=128, seed=7), STEPS), []
    pruner.begin()
    for step, tokens in enumerate(batches(), start=1):
        losses.append(engine.mean(engine.train_step(mine(tokens), RATE)))
        pruner.after_step(step)
    pruner.end()
    names = [f"transformer.h.{layer}.{part}.c_proj.weight" for layer in range(2) for part in ("attn", "mlp")]
    whole = torch.cat([engine.gather(name).flatten() for name in names])
    engine.load_base()
    engine.restart(0.0, trainable="vectors")
    before = {name: engine.gather(name).clone() for name in engine.shapes}
    engine.train_step(mine(next(batches())), RATE)
    changed = [name for name, weights in before.items() if not torch.equal(engine.gather(name), weights)]
    engine.restart(0.0)
    return {"losses": losses, "weights": whole[::500].tolist(), "num_zeros": int((whole == 0).sum()), "changed": changed}


def come_back(engine: Any) -> dict[str, bool]:
    """A weight that is pruned while masks move leaves its value behind, and takes it up again without moments."""
    engine.load_base()
    engine.restart(0.0)
    engine.keep_latents(lambda gathered, weights, gradients: gathered.add_(gradients))
    tokens = next(batches())[engine.rank * engine.sequences_per_rank:][:engine.sequences_per_rank]
    before = {p.name: engine.gather(p.name) for p in engine.prunables}
    everything = engine.masks()
    engine.set_masks([None if mask is None else torch.zeros_like(mask) for mask in everything])
    engine.train_step(tokens, RATE)  # the weights behind their masks pass it unchanged
    engine.set_masks([None if mask is None else mask for mask in everything])
    values = all(torch.equal(engine.gather(name), weight) for name, weight in before.items())
    moments = all(not state[name].any() for shard in engine.prunable_shards
                  for state in [engine.optimizer.state[shard.master]] for name in ("exp_avg", "exp_avg_sq"))
    engine.restart(0.0)
    return {"values": values, "moments": moments}


def head_logits(engine: Any) -> dict[str, Any]:
    from raysearch.config import Action
    from raysearch.trial.pruner import Pruner
    from raysearch.trial.sizes import weighed

    engine.load_base()
    Pruner(engine, Action(pattern="head", scope="layer", sparsity=0.5), 0).begin()
    engine.model.eval()
    with torch.no_grad():
        logits = engine.model(input_ids=torch.arange(40, device=engine.device).view(2, 20)).logits[:, -1, :20]
    size = engine.model.config.n_embd // engine.model.config.n_head
    pruned = [(layer, head) for layer in range(engine.model.config.n_layer) for head in range(engine.model.config.n_head)
              if not engine.gather(f"transformer.h.{layer}.attn.c_proj.weight")[head * size:(head + 1) * size].any()]
    for layer, head in pruned:
        bias = engine.gather(f"transformer.h.{layer}.attn.c_attn.bias").view(3, -1, size)
        assert not bias[:, head].any()
        assert engine.gather_mask(f"transformer.h.{layer}.attn.c_attn.bias") is not None
    counted = list(weighed(engine, "float32")[3:])
    before = {name: engine.gather(name).clone() for name in engine.shapes}
    engine.restart(1e3)
    engine.train_step(next(batches())[engine.rank * engine.sequences_per_rank:][:engine.sequences_per_rank], 1e-4)
    moved = {name: float((engine.gather(name) - weights).abs().max()) for name, weights in before.items()}
    engine.restart(0.0)
    return {"pruned": pruned, "logits": logits.tolist(), "sizes": counted,
            "shrunk": sorted(name for name, most in moved.items() if most > 0.01) == sorted(engine.prunable_names)}


def main(model: str, *stages: str) -> dict[str, Any]:
    from test_criteria import TENANTS
    from test_patterns import row_pairs

    from raysearch.pruning.criteria import CRITERIA
    from raysearch.pruning.patterns import PATTERNS
    from raysearch.training.engine import Engine

    CRITERIA.update(TENANTS)
    PATTERNS["row_pairs"] = row_pairs
    measured = {}
    for stage in map(int, stages):
        engine = Engine(model, prunable="matrices", zero_stage=stage, dtype="float32", batch_tokens=128, context_tokens=32,
                        weight_decay=0.0)
        measured[stage] = {"masks": masks_of_all(engine), "come_back": come_back(engine), "heads": head_logits(engine),
                           "distilled": distilled_round(engine),
                           "calibrated": {each: calibrated_rounds(engine, each) for each in (*BY_TEXT, "sparsegpt")},
                           **{each: gradual_round(engine, each) for each in IN_THE_ROUND},
                           "moved": {each: moved_masks(engine, each) for each in ("rigl", "set")},
                           "taylor": taylor_masks(engine), "soft": soft_round(engine), "at_units": at_units(engine),
                           "at_layers": at_layers(engine)}
    return measured


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    answer(main(*sys.argv[1:]))
