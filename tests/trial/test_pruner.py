"""Which weights an action removes, on a real engine."""

from raysearch.config import Action
from raysearch.study.records import RoundRecord
from raysearch.trial.round import dense_round, load_candidate, run_round
from raysearch.trial.worker import Worker


def test_scopes_cut_where_they_say(worker: Worker) -> None:
    def by_layer(scope: str) -> RoundRecord:
        return run_round(worker, dense_round(worker), Action(sparsity=0.35, scope=scope))

    for scope, spread in (("layer", 0.001), ("row", 0.02)):
        values = by_layer(scope).layer_sparsity.values()
        assert max(values) - min(values) < spread, scope
    assert max(by_layer("global").layer_sparsity.values()) - min(by_layer("global").layer_sparsity.values()) > 0.001
    load_candidate(worker, by_layer("row"))
    weight = worker.engine.gather("transformer.h.0.mlp.c_fc.weight")  # Conv1D keeps [inputs, outputs]
    zeros = (weight == 0).sum(0)
    assert zeros.min() == zeros.max() == round(0.35 * weight.shape[0])
