"""Fine-tuning on a real engine."""

from raysearch.config import Action
from raysearch.training.finetune import finetune
from raysearch.trial.worker import Worker

TOKENS = 64 * 16


def test_fine_tuning_lowers_the_loss(worker: Worker) -> None:
    worker.engine.load_base()
    worker.loaded_key = None
    losses, steps = [], []
    for start in (0, 16 * TOKENS):
        worker.engine.restart(0.0)
        action = Action(sparsity=0.0, finetune_tokens=16 * TOKENS, learning_rate=3e-3, data_start_tokens=start)
        losses.append(finetune(worker.engine, worker.inputs.blocks, action, 0.1, steps.append))
    assert losses[1] < losses[0] - 0.1
    assert steps == [*range(1, 65)] * 2
