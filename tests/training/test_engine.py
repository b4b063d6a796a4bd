"""The invariant of sharded pruning, for every ZeRO stage, dtype and world size, on real engines; on GPUs too, where bf16 is
compiled."""

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import answer, run_ranks
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from raysearch.cluster.placement import MicroBatch

CASES = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("float32", "bfloat16")]


ON_DEVICES = [pytest.param((device, size), id=f"{device}-{size}", marks=[pytest.mark.gpu] * (device == "cuda"))
              for device in ("cpu", "cuda") for size in (1, 2)]


def on_ranks(model: Path, device: str, world_size: int, *arguments: str) -> dict[str, dict]:
    if device == "cuda" and torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA devices")
    return run_ranks(__file__, world_size, [str(model), *arguments], on_gpus=device == "cuda")


@pytest.fixture(scope="module", params=ON_DEVICES)
def measured(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return on_ranks(tiny_model, *request.param, "invariant", str(tmp_path_factory.mktemp("stored")))


@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_zeros_of_shards_module_and_mask_are_one(measured: dict, stage: int, dtype: str) -> None:
    case = measured[f"{stage}/{dtype}"]
    assert case["num_pruned"] == case["num_wanted"]
    assert case["mask_is_reference"]
    for moment in ("after_prune", "after_steps", "after_reload"):
        for zeros in case[moment].values():
            assert zeros == case["num_wanted"], (moment, case[moment])
    assert case["mask_kept"]
    assert case["stored_is_exact"]
    assert case["num_graphs"] > 0 or not case["is_compiled"]
    assert case["loss_fell"]
    assert case["base_is_exact"]


def test_result_does_not_depend_on_the_stage(measured: dict) -> None:
    losses = [measured[f"{stage}/float32"]["losses"] for stage in (0, 1, 2, 3)]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=2e-5 if measured["device"] == "cpu" else 2e-4)  # a GPU adds in any order


@pytest.mark.parametrize("measured", ON_DEVICES[1::2], indirect=True)
@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_checkpointed_micro_batches_give_the_step_of_the_whole(measured: dict, stage: int, dtype: str) -> None:
    case = measured[f"{stage}/{dtype}"]
    exact = 1e-6 if measured["device"] == "cpu" else 1e-5
    assert case["micro"] == pytest.approx(case["whole"], rel=exact if dtype == "float32" else 2e-3)


def test_a_step_is_on_the_mean_over_what_counts_on_all_ranks(measured: dict, tiny_model: Path) -> None:
    """As transformers and torch make it of the whole batch."""
    model = GPT2LMHeadModel.from_pretrained(tiny_model)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": [p for p in model.parameters() if p.dim() < 2],
                                                          "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    wanted = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS.where(counted(0), -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        wanted.append(loss.item())
    for stage in (0, 1, 2, 3):
        assert measured[f"{stage}/float32"]["counted"] == pytest.approx(wanted, rel=2e-5), stage


def test_masks_do_not_depend_on_the_world_size(tiny_model: Path) -> None:
    one, two = (run_ranks(__file__, world_size, [str(tiny_model), "masks"]) for world_size in (1, 2))
    assert one == two
    assert len(one) == 2 * 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_later_trial_compiles_anything(tiny_model: Path, device: str) -> None:
    for stage, case in on_ranks(tiny_model, device, 1, "graphs").items():
        # forward and loss; or a block, for all of them, and the head
        assert case["num_graphs"] == {"0": 1, "0, wide": 2, "3": 2}[stage], stage
        assert case["num_breaks"] == 0, stage
        assert case["num_masked"] == {"0": 1, "0, wide": 0, "3": 0}[stage], stage  # whatever the masks
        assert case["num_later"] == 0, stage
        assert case["compiled"] == pytest.approx(case["eager"], rel=1e-5), stage


@pytest.fixture(scope="module")
def in_memory(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Of two ranks at ZeRO-3: MB of a model of 66 M fp32 weights, and what they had in memory."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=12_000, n_positions=64, n_embd=768, n_layer=8, n_head=12)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back at once, and is not counted
        return run_ranks(__file__, 2, [str(tiny_model), "large", str(folder)])


CONSTANT_MB = 60
"""Gloo's buffers, and small parameters that DeepSpeed keeps whole."""


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "shares"), [
    ("begin", 7),  # weights, masters, gradients, two moments, mask, and one that passes
    ("load again", 1), ("load_base", 0.5), ("prune", 1), ("store", 0), ("load", 1)])
def test_no_rank_has_a_copy_of_a_large_model(in_memory: list, moment: str, shares: float) -> None:
    for rank in in_memory:
        limit = shares * rank["model"] / 2 + 2 * rank["largest"] + CONSTANT_MB
        assert rank[moment] < limit, (moment, rank)
    assert in_memory[0]["is_exact"]


def measure(model: str, folder: str, stage: int, dtype: str) -> dict:
    from torch._dynamo.utils import counters

    from raysearch.kernels import selection_passes
    from raysearch.models.weights import read_sparse, to_store, write_weights
    from raysearch.pruning.selection import MAGNITUDES, keep_masks
    from raysearch.training.engine import Engine
    from raysearch.training.hardware import can_compile

    torch._dynamo.reset()  # or the engines of one process, whose code is the same, would reach its limit of recompilations
    counters.clear()
    settings: dict[str, Any] = {"prunable": "matrices", "zero_stage": stage, "dtype": dtype, "batch_tokens": 128,
                                "context_tokens": 32, "weight_decay": 0.1,
                                "compiled": dtype == "bfloat16" and can_compile()}
    # two sequences at a time on either number of GPUs: one graph
    engine = Engine(model, **settings, micro_batch=MicroBatch(64, False) if settings["compiled"] else None)
    rank, world_size = engine.shard_rank
    names = [p.name for p in engine.prunables]
    values = [shard.values for shard in engine.prunable_shards]
    dense = {name: engine.gather(name) for name in engine.shapes}
    flat = torch.cat([dense[name].flatten() for name in names]).abs()
    num_wanted = int(0.6 * flat.numel())
    keep = keep_masks(values, [shard.index for shard in engine.prunable_shards], num_wanted,
                      all_reduce=engine.all_reduce, rank=rank, world_size=world_size,
                      passes=selection_passes(MAGNITUDES, engine.device))
    engine.set_masks(on_all_shards(engine, keep))
    reference = torch.ones_like(flat, dtype=torch.bool)
    reference[flat.argsort(stable=True)[:num_wanted]] = False
    mask = torch.cat([engine.gather(name).flatten() != 0 for name in names])

    def zeros() -> dict[str, int]:
        import deepspeed

        parameters = [engine.parameters[name] for name in names]
        with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
            module = sum(int((p == 0).sum()) for p in parameters)
        counts = engine.nonzero_counts()
        return {"module": module, "shards": flat.numel() - sum(counts[name] for name in names),
                "full": sum(int((engine.gather(name) == 0).sum()) for name in names)}

    case = {"num_wanted": num_wanted, "num_pruned": int((~mask).sum()), "mask_is_reference": bool(torch.equal(mask, reference)),
            "after_prune": zeros(), "losses": []}
    engine.restart(0.0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 257, (4, 32), generator=generator)
    mine = tokens[engine.rank * engine.sequences_per_rank:][:engine.sequences_per_rank]
    for _ in range(5):
        case["losses"].append(engine.mean(engine.train_step(mine, 3e-3)))
    case["after_steps"] = zeros()
    case["mask_kept"] = bool(torch.equal(torch.cat([engine.gather(name).flatten() != 0 for name in names]), mask))
    case["loss_fell"] = case["losses"][-1] < case["losses"][0] - 0.05
    weights = {name: engine.gather(name) for name in engine.shapes}
    file = Path(folder) / f"{stage}-{dtype}.safetensors"
    stored = {name: to_store(weights[name], engine.gather_mask(name)) for name in engine.shapes}
    engine.from_rank_0(lambda: write_weights(file, stored))
    engine.load(dense)
    assert engine.nonzero_counts()[names[0]] == dense[names[0]].count_nonzero()
    engine.load(read_sparse(file, None))
    case["stored_is_exact"] = all(torch.equal(engine.gather(name), weights[name]) for name in weights)
    engine.restart(0.0)
    engine.train_step(mine, 3e-3)
    case["after_reload"] = zeros()
    engine.load_base()
    if engine.world_size == 2:
        cut = Engine(model, **settings, micro_batch=MicroBatch(32, is_checkpointed=True))
        case["whole"], case["micro"] = steps_of(engine), steps_of(cut)
        for each in (engine, cut):
            each.load_base()
        case["whole"] += steps_of(engine, counted(0))
        case["micro"] += steps_of(cut, counted(0))
    engine.load_base()
    case["counted"] = steps_of(engine, counted(0))
    engine.load_base()
    case["base_is_exact"] = all(torch.equal(engine.gather(name), dense[name]) for name in dense)
    return case | {"is_compiled": settings["compiled"], "num_graphs": counters["stats"]["unique_graphs"]}


def in_memory_of(tiny: str, folder: str) -> list[dict[str, float]]:
    """Most MB of memory of its own (files that are mapped belong to the node) that each moment added to what there was."""
    import threading
    import types

    from raysearch.config import Action
    from raysearch.models.model import load_model
    from raysearch.models.weights import read_sparse
    from raysearch.study.ledger import Ledger
    from raysearch.training.engine import Engine
    from raysearch.trial.candidate import weigh, written_meanwhile
    from raysearch.trial.pruner import Pruner

    def anonymous() -> float:
        return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith("RssAnon"))

    found: dict[str, Any] = {}

    @contextlib.contextmanager
    def measuring(moment: str) -> Iterator[None]:
        gc.collect()
        before, most, ended = anonymous(), [0.0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.005):
                most.append(anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
        found[moment] = max(most) - before

    def build(model: str) -> Engine:
        return Engine(model, prunable="matrices", zero_stage=3, dtype="float32", batch_tokens=128, context_tokens=32,
                      weight_decay=0.1)

    build(tiny)  # with what is imported late
    model = str(Path(folder) / "model")
    with measuring("begin"):
        engine = build(model)
    sizes = [torch.Size(shape).numel() * 4 / 2**20 for shape in engine.shapes.values()]
    found |= {"model": sum(sizes), "largest": max(sizes)}
    with measuring("load again"):  # a teacher
        engine._layout.frozen(lambda: load_model(model))
    with measuring("load_base"):
        engine.load_base()
    with measuring("prune"):
        Pruner(engine, Action(sparsity=0.5), 0).begin()
    weights = {name: engine.gather(name) for name in list(engine.shapes)[2:8]}
    study = types.SimpleNamespace(model=types.SimpleNamespace(dtype="float32"))
    with contextlib.ExitStack() as stored:
        with measuring("store"):
            worker: Any = types.SimpleNamespace(engine=engine, ledger=Ledger(Path(folder) / "study"), study=study,
                                                latency=lambda: None)
            written = stored.enter_context(written_meanwhile(worker, "key", weigh(worker, None)))
            file = engine.from_rank_0(lambda: written.result()[0])
        engine.load_base()
        with measuring("load"):
            engine.load(read_sparse(file, None))
    found["is_exact"] = all(torch.equal(engine.gather(name), weight) for name, weight in weights.items())
    return engine.gather_objects(found)


TOKENS = torch.randint(0, 257, (4, 32), generator=torch.Generator().manual_seed(1))


def counted(seed: int) -> Tensor:
    """Which of TOKENS count: more and more of a sequence, of the first none."""
    return torch.rand(4, 32, generator=torch.Generator().manual_seed(seed)) < torch.tensor([[0.0], [0.1], [0.3], [0.9]])


def steps_of(engine: Any, counts: Tensor | None = None) -> list[float]:
    """Losses of four steps, of which the last three depend on the gradients."""
    engine.restart(0.0)
    mine = TOKENS[engine.rank * engine.sequences_per_rank:][:engine.sequences_per_rank]
    return [engine.mean(engine.train_step(mine, 1e-3, counted=counts)) for _ in range(4)]


def graphs(model: str) -> dict:
    """What is compiled in a trial's steps, and in the next one's; traced as on a GPU, without generating code."""
    import functools

    from torch._dynamo.utils import counters

    from raysearch.training import loss
    from raysearch.training.engine import Engine

    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    found = {}
    for name, block_work in (("0", 1 << 24), ("0, wide", 1), ("3", 1 << 24)):  # stage 3 last: it changes how models are loaded
        loss.BLOCK_WORK, stage = block_work, int(name[0])
        torch._dynamo.reset()
        engines, linear = {}, torch.nn.functional.linear
        for is_compiled in (True, False):
            engines[is_compiled] = Engine(model, prunable="matrices", zero_stage=stage, dtype="float32", batch_tokens=128,
                                          context_tokens=32, weight_decay=0.1, micro_batch=MicroBatch(64, False),
                                          compiled=is_compiled)
            if is_compiled:  # DeepSpeed's is compiled anew for each block
                assert torch.nn.functional.linear is linear
        counters.clear()
        case: dict[str, Any] = {"eager": steps_of(engines[False]), "compiled": steps_of(engines[True])}
        case |= {"num_graphs": counters["stats"]["unique_graphs"], "num_breaks": sum(counters["graph_break"].values())}
        engine = engines[True]
        steps_of(engine, counted(0))
        case["num_masked"] = counters["stats"]["unique_graphs"] - case["num_graphs"]
        engine.load_base()
        for seed in range(4):
            steps_of(engine, counted(seed))
        keep = [torch.rand_like(shard.values) < 0.5 for shard in engine.prunable_shards]
        engine.set_masks(on_all_shards(engine, keep))
        steps_of(engine)
        engine.model.eval()
        with torch.no_grad():
            engine.model(input_ids=torch.zeros(1, 7, dtype=torch.int64, device=engine.device))
        found[name] = case | {"num_later": counters["stats"]["unique_graphs"] - case["num_graphs"] - case["num_masked"]}
    return found


def on_all_shards(engine: Any, masks: list[Tensor]) -> list[Tensor | None]:
    """Masks of the prunable shards, in order, and none for the others."""
    of_prunable = iter(masks)
    return [next(of_prunable) if shard.name in engine.prunable_names else None for shard in engine.shards]


def masks(model: str) -> dict:
    """Hashes of the masks of every scope after fine-tuning nothing, for two stages."""
    import hashlib

    from raysearch.config import Action
    from raysearch.training.engine import Engine
    from raysearch.trial.pruner import Pruner

    found = {}
    actions = [Action(sparsity=0.37, scope=scope) for scope in ("global", "layer", "row")]
    actions.append(Action(threshold=0.9, threshold_unit="std"))
    for stage in (2, 3):
        engine = Engine(model, prunable="matrices", zero_stage=stage, dtype="bfloat16", batch_tokens=128,
                        context_tokens=32, weight_decay=0.1)
        dense = {name: engine.gather(name).clone() for name in engine.shapes}
        for action in actions:
            engine.load(dense)
            Pruner(engine, action, 0).begin()
            digest = hashlib.sha256()
            for prunable in engine.prunables:
                digest.update((engine.gather(prunable.name) != 0).numpy().tobytes())
            found[f"{stage}/{action.scope}/{action.threshold}"] = digest.hexdigest()
    return found


if __name__ == "__main__":
    model, what, *folder = sys.argv[1:]
    if what == "invariant":
        from raysearch.training.hardware import device_type

        result: Any = {f"{stage}/{dtype}": measure(model, *folder, stage, dtype) for stage, dtype in CASES}
        result["device"] = device_type()
    elif what == "large":
        result = in_memory_of(model, *folder)
    else:
        result = {"masks": masks, "graphs": graphs}[what](model)
    answer(result)
