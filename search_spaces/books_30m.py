"""books-30m, 29.7 M parameters, on GPUs: 72 trials, of which four have three or four rounds and the others one.

It reads `$RAYSEARCH_BOOKS/models/books-30m` (what `raysearch pretrain --preset books-30m` writes) and
`$RAYSEARCH_BOOKS/data`, with books/train.txt and lambada/test.jsonl in it; RAYSEARCH_BOOKS is ../shared unless set.
"""

import os
from pathlib import Path

from search_spaces.demo import way_to_prune

ROOT = Path(os.environ.get("RAYSEARCH_BOOKS", "../shared")).resolve()

STUDY = {
    "model": {"path": str(ROOT / "models" / "books-30m"), "dtype": "bfloat16"},
    "data": {"corpus": str(ROOT / "data" / "books" / "train.txt"), "context_tokens": 512, "epoch_tokens": 1_966_080},
    "training": {"batch_tokens": 65_536},
    "evaluation": {"tasks": ("text", "last_word", "choice", "lambada"), "data_dir": str(ROOT / "data"), "num_items": 300},
    "search": {"objectives": ("num_nonzero", "text/bits_per_byte"), "num_trials": 72, "max_concurrent": 4},
    "cluster": {"gpus_per_rank": 0.5, "cpus_per_rank": 2.0},
}


def space(trial):
    return {"finetune_epochs": trial.suggest_categorical("finetune_epochs", [0.5, 1.0, 2.0]),
            "learning_rate": trial.suggest_float("learning_rate", 2e-4, 2e-3, log=True),
            "l1_lambda": trial.suggest_float("l1_lambda", 1e-6, 1e-2, log=True),
            "num_rounds": trial.suggest_int("num_rounds", 3, 4),
            **way_to_prune(trial, initial_sparsity=(0.0, 0.3), target_sparsity=(0.4, 0.95), rate=(0.15, 0.5),
                           threshold=(0.3, 1.5))}
