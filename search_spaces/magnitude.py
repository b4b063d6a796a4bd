"""Magnitude pruning with the paper's six hyper-parameters (arXiv 2310.04573), for a model and a corpus of yours.

They are the threshold, the rate, the schedule, the strength of L1, the epochs of fine-tuning, and the initial and target
sparsity. The paper gives values for the rate alone; where the other ranges come from stands beside them.
"""

STUDY = {
    "model": {"path": "models/mine"},
    "data": {"corpus": "data/finetune.txt", "context_tokens": 1024, "epoch_tokens": 10_485_760},
    "training": {"batch_tokens": 65_536},
    "evaluation": {"tasks": ("text", "lambada"), "num_items": 1000},
    "search": {"objectives": ("num_nonzero", "text/bits_per_byte"), "num_trials": 100, "max_concurrent": 4},
}


def space(trial):
    fields = {"finetune_epochs": trial.suggest_categorical("finetune_epochs", [0.5, 1.0, 2.0]),  # ours, as in books_30m
              "l1_lambda": trial.suggest_float("l1_lambda", 1e-6, 1e-2, log=True)}  # ours, as in books_30m
    mode = trial.suggest_categorical("mode", ["rate", "target", "threshold"])
    if mode == "rate":  # of what is left, in each round: the rates of the paper's tables
        return fields | {"schedule": "constant", "rate": trial.suggest_categorical("rate", [0.1, 0.3, 0.5]),
                         "num_rounds": trial.suggest_int("num_rounds", 1, 5)}
    if mode == "target":  # every schedule that has several rounds; the sparsities are ours, as in books_30m
        return fields | {"schedule": trial.suggest_categorical("schedule", ["linear", "exponential", "cubic", "cosine"]),
                         "initial_sparsity": trial.suggest_float("initial_sparsity", 0.0, 0.3),
                         "target_sparsity": trial.suggest_float("target_sparsity", 0.4, 0.95),
                         "num_rounds": trial.suggest_int("by_target/num_rounds", 2, 5)}
    # in standard deviations of a layer, as Han et al. 2015 (arXiv 1506.02626); of a normal distribution 0.3 cuts 24 %, 1.5 87 %
    return fields | {"schedule": "linear", "threshold": trial.suggest_float("threshold", 0.3, 1.5), "threshold_unit": "std",
                     "num_rounds": trial.suggest_int("by_threshold/num_rounds", 1, 4)}
