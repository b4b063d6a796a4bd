"""Opening a deployment folder, of either format."""

from pathlib import Path

import pytest
import torch

import raysearch
from raysearch.deploy.export import export
from raysearch.models.sparse import SparseLinear
from raysearch.models.weights import stored_bytes
from raysearch.study.records import RoundRecord
from raysearch.trial.worker import Worker


def test_a_sparse_model_runs_from_its_kept_weights(worker: Worker, candidate: RoundRecord, tmp_path: Path) -> None:
    small = export(worker.ledger, candidate.key, tmp_path / "small", "sparse")
    model, dense = raysearch.load(small), raysearch.load(small, backend="dense")
    names = {p.name for p in worker.engine.prunables}
    assert names.isdisjoint(dict(model.named_parameters()))
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == len(names)
    assert sum(layer.sparse.num_bytes for layer in layers) == sum(
        stored_bytes(p.numel(), int(p.count_nonzero()), 4) for name, p in dense.named_parameters() if name in names)
    tokens = torch.arange(40).view(2, 20)
    assert torch.allclose(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    half = model.to(torch.bfloat16)  # another dtype: packed again
    assert torch.allclose(half(tokens).logits.float(), dense(tokens).logits, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="backend must be sparse or dense, got 'fast'"):
        raysearch.load(small, backend="fast")
