"""What a worker of pretraining plans and measures; whole runs are in test_pretrain.py."""

from types import SimpleNamespace

import pytest
import torch

from raysearch.cluster.placement import MicroBatch
from raysearch.training.presets import PRESETS
from raysearch.training.pretrain_worker import MAX_EVAL_BLOCKS, eval_indices, held_out_loss, planned
from raysearch.trial.worker import Worker


@pytest.mark.parametrize(("preset", "tokens"), [("gpt2-small", 65_536), ("gpt-efficio-950m", 16_384)])
def test_the_presets_of_the_paper_fit_one_gpu_of_80_gb(preset: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.training.pretrain_worker.memory_bytes", lambda: 80e9)
    job = {"dtype": "bfloat16", "zero_stage": 0, "batch_tokens": PRESETS[preset].batch_tokens}
    assert planned(PRESETS[preset], job, 1)[1] == MicroBatch(tokens, is_checkpointed=False)


@pytest.mark.parametrize("num_blocks", [1, 7, MAX_EVAL_BLOCKS, 5 * MAX_EVAL_BLOCKS + 3])
def test_held_out_blocks_are_spread_evenly(num_blocks: int) -> None:
    indices = eval_indices(SimpleNamespace(tokens=range(num_blocks)))
    assert len(indices) == min(num_blocks, MAX_EVAL_BLOCKS)
    assert indices[0] == 0
    assert indices[-1] == num_blocks - 1
    gaps = set((indices[1:] - indices[:-1]).tolist())
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_held_out_loss_is_the_mean_over_blocks(worker: Worker) -> None:
    blocks = worker.inputs.blocks
    assert blocks is not None
    worker.engine.load_base()
    wanted = []
    with torch.no_grad():
        for index in eval_indices(blocks):
            tokens = blocks.batch([index])
            wanted.append(float(worker.engine.model.eval()(input_ids=tokens, labels=tokens).loss))
    assert held_out_loss(worker.engine, blocks) == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
