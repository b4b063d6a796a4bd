"""Every method: criteria, patterns, budgets, distillation, with and without training. books-30m on GPUs, as in books_30m.py.

What goes with what is in docs/how_it_works.md; a combination that does not is refused before it runs. A name stands for one
list of choices, so where the choices are fewer the name is another.
"""

from search_spaces.books_30m import STUDY as BOOKS

STUDY = {**BOOKS, "search": {**BOOKS["search"], "num_trials": 90}}
LAYER_ORDERS = ("top", "bottom", "alternate", "symmetric", "contribution")


def space(trial):
    def choice(name, *choices):
        return trial.suggest_categorical(name, choices)

    epochs = choice("finetune_epochs", 0.0, 0.5, 1.0, 2.0)
    if epochs:
        criterion = choice("criterion", "magnitude", "gradual_magnitude", "sr_ste", "movement", "soft_movement", "rigl",
                           "set", "l0", "taylor", "activation", "wanda", "ria", "sparsegpt", "l2", *LAYER_ORDERS)
        fields = {"learning_rate": trial.suggest_float("learning_rate", 2e-4, 2e-3, log=True),
                  "l1_lambda": choice("l1_lambda", 0.0, 1e-5, 1e-4, 1e-3),
                  "lr_schedule": choice("lr_schedule", "cosine", "constant", "one_cycle"),
                  "distill_alpha": choice("distill_alpha", 0.0, 0.5, 1.0),
                  "distill_hidden": choice("distill_hidden", 0.0, 0.1, 1.0)}
        if criterion in ("magnitude", "taylor", "activation", "l2", "wanda", "ria", "sparsegpt", *LAYER_ORDERS):
            fields["layer_drop"] = choice("layer_drop", 0.0, 0.1, 0.2)
            if not fields["l1_lambda"]:
                fields["trainable"] = choice("trainable", "all", "vectors")
        if fields["distill_alpha"]:
            fields["temperature"] = trial.suggest_float("temperature", 1.0, 4.0)
    else:
        criterion, fields = choice("one_shot/criterion", "magnitude", "taylor", "activation", "wanda", "ria", "sparsegpt", "l2",
                                   *LAYER_ORDERS), {}
    fields |= {"criterion": criterion, "finetune_epochs": epochs}
    looks_at_text = criterion in ("wanda", "ria", "sparsegpt")
    if looks_at_text or criterion in ("taylor", "activation", "contribution"):
        fields["calibration_sequences"] = choice("calibration_sequences", 32, 128)
    if looks_at_text:
        fields["pattern"] = choice("calibrated/pattern", "unstructured", "2:4", "4:8", "1:4")
    elif criterion == "soft_movement":
        return fields | {"threshold": trial.suggest_float("soft/threshold", 0.02, 0.4, log=True),
                         "score_rate": trial.suggest_float("score_rate", 3e-3, 0.1, log=True),
                         "score_penalty": trial.suggest_float("score_penalty", 10, 1000, log=True)}
    elif criterion in ("rigl", "set"):
        fields |= {"pattern": "unstructured", "drop_fraction": trial.suggest_float("drop_fraction", 0.1, 0.5),
                   "mask_interval_steps": choice("moving/mask_interval_steps", 10, 30, 100)}
    elif criterion in LAYER_ORDERS:
        fields["pattern"] = "layer"
    elif criterion == "l0":
        fields |= {"pattern": choice("l0/pattern", "head", "neuron"),
                   "score_rate": trial.suggest_float("l0/score_rate", 3e-3, 0.3, log=True),
                   "gate_penalty": trial.suggest_float("gate_penalty", 0.01, 10.0, log=True)}
    elif criterion == "activation":
        fields["pattern"] = choice("activation/pattern", "head", "neuron")
    elif criterion == "l2":
        fields["pattern"] = choice("l2/pattern", "head", "neuron", "layer", "block", "hybrid")
    elif criterion == "taylor":
        fields["pattern"] = choice("taylor/pattern", "unstructured", "2:4", "4:8", "1:4", "head", "neuron", "layer")
    else:
        fields["pattern"] = choice("pattern", "unstructured", "2:4", "4:8", "1:4", "head", "neuron", "layer", "block",
                                   "block64", "hybrid")
    is_gradual = criterion in ("gradual_magnitude", "sr_ste", "movement", "l0")
    if criterion == "sr_ste":
        fields["mask_decay"] = trial.suggest_float("mask_decay", 1e-6, 1e-2, log=True)
    if is_gradual:
        fields["mask_interval_steps"] = choice("mask_interval_steps", 1, 5, 10)
    if ":" in fields["pattern"]:
        return fields
    if epochs and fields["pattern"] in ("head", "neuron", "layer") and criterion != "l0" and not (
            fields.get("layer_drop") or fields.get("trainable") == "vectors"):
        fields["group_lambda"] = choice("group_lambda", 0.0, 0.1, 1.0)
    if fields["pattern"] == "layer":
        return fields | {"target_sparsity": trial.suggest_float("layer/target_sparsity", 0.1, 0.5)}
    if fields["pattern"] in ("block", "block64", "hybrid"):
        return fields | {"target_sparsity": trial.suggest_float("block/target_sparsity", 0.3, 0.9),
                         "scope": choice("block/scope", "global", "layer")}
    if fields["pattern"] in ("head", "neuron"):
        fields |= {"target_sparsity": trial.suggest_float("unit/target_sparsity", 0.1, 0.7),
                   "scope": choice("unit/scope", "global", "layer")}
        return fields | {"uniform": fields["scope"] == "layer" and choice("uniform", False, True)}
    if criterion == "magnitude" and choice("by", "sparsity", "threshold") == "threshold":
        return fields | {"threshold": trial.suggest_float("threshold", 0.3, 1.5), "threshold_unit": "std"}
    if criterion == "sparsegpt":
        fields["scope"] = "layer"
    elif criterion in ("rigl", "set"):
        fields["scope"] = choice("moving/scope", "global", "layer")
    else:
        fields["scope"] = (choice("calibrated/scope", "layer", "row") if looks_at_text
                           else choice("scope", "global", "layer", "row"))
    if fields["scope"] != "global":
        fields["budget"] = choice("budget", "uniform", "erdos_renyi", "owl")
    if fields.get("budget") == "owl":
        fields |= {"owl_lambda": trial.suggest_float("owl_lambda", 0.02, 0.2),
                   "owl_m": choice("owl_m", 3.0, 5.0, 7.0, 10.0),
                   "calibration_sequences": fields.get("calibration_sequences") or choice("owl/calibration_sequences", 32, 128)}
    if epochs and "mask_interval_steps" not in fields:
        fields |= {"schedule": "cubic", "num_rounds": trial.suggest_int("num_rounds", 1, 3)}
    return fields | {"target_sparsity": trial.suggest_float("target_sparsity", 0.4, 0.95)}
