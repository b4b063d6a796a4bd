"""The demo's study: the tiny model, every hyper-parameter of the paper, a few minutes on two cores.

`STUDY` holds the fields of raysearch.config.Study, `space` returns fields of raysearch.config.TrialConfig. The space is
conditional: a trial prunes towards a target along a schedule, by a rate per round, or by a threshold.
"""

STUDY = {
    "model": {"path": "demo/model"},
    "data": {"corpus": "builtin", "context_tokens": 128, "epoch_tokens": 16_384},
    "training": {"batch_tokens": 1024},
    "evaluation": {"num_items": 60},
    "search": {"objectives": ("num_nonzero", "text/bits_per_byte"), "num_trials": 32, "max_concurrent": 2},
}


def way_to_prune(trial, *, initial_sparsity, target_sparsity, rate, threshold):
    """One of three ways; ranges are (least, most). They are given by `space`, because a sweep that goes on compares the code
    of `space` alone and would not notice a change of this function."""
    mode = trial.suggest_categorical("mode", ["target", "rate", "threshold"])
    if mode == "target":
        return {"schedule": trial.suggest_categorical("schedule", ["linear", "exponential", "cubic", "cosine"]),
                "initial_sparsity": trial.suggest_float("initial_sparsity", *initial_sparsity),
                "target_sparsity": trial.suggest_float("target_sparsity", *target_sparsity),
                "scope": trial.suggest_categorical("scope", ["global", "layer"])}
    if mode == "rate":
        return {"schedule": "constant", "rate": trial.suggest_float("rate", *rate)}
    return {"schedule": "linear", "threshold": trial.suggest_float("threshold", *threshold), "threshold_unit": "std"}


def space(trial):
    return {"finetune_epochs": trial.suggest_categorical("finetune_epochs", [0.5, 1.0, 2.0]),
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 2e-3, log=True),
            "l1_lambda": trial.suggest_float("l1_lambda", 1e-5, 1e-1, log=True),
            "num_rounds": trial.suggest_int("num_rounds", 3, 4),
            **way_to_prune(trial, initial_sparsity=(0.0, 0.3), target_sparsity=(0.4, 0.95), rate=(0.15, 0.5),
                           threshold=(0.3, 1.5))}
