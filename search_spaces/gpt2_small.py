"""GPT-2 of 124 M parameters on GPUs: two ranks per trial, ZeRO-1, bf16. The example of docs/cluster.md.

It reads two folders that every node must see. `model` is what

    raysearch pretrain --preset gpt2-small --corpus CORPUS --out /shared/models/gpt2-small

writes, or any GPT-2 in Hugging Face's format (save_pretrained, with its tokenizer). `corpus` is a folder of .txt, .jsonl
or .parquet files, or the name of a Hugging Face dataset. LAMBADA is read from the hub, or from data_dir/lambada/test.jsonl.

124 M parameters fit on one GPU many times over; two ranks halve the time of a round. For a model that does not fit,
set both num_ranks and zero_stage to "auto".
"""

STUDY = {
    "model": {"path": "/shared/models/gpt2-small", "dtype": "bfloat16"},
    "data": {"corpus": "/shared/data/finetune", "context_tokens": 1024, "epoch_tokens": 10_485_760},
    "training": {"batch_tokens": 65_536},
    "evaluation": {"tasks": ("text", "last_word", "lambada"), "num_items": 1000},
    "search": {"objectives": ("num_nonzero", "text/bits_per_byte"), "num_trials": 220, "max_concurrent": 8},
    "cluster": {"num_ranks": 2, "zero_stage": 1, "gpus_per_rank": 1.0, "cpus_per_rank": 4.0},
}


def space(trial):
    fields = {
        "finetune_epochs": trial.suggest_categorical("finetune_epochs", [0.5, 1.0, 2.0]),
        "learning_rate": trial.suggest_float("learning_rate", 5e-5, 1e-3, log=True),
        "l1_lambda": trial.suggest_float("l1_lambda", 1e-6, 1e-2, log=True),
    }
    mode = trial.suggest_categorical("mode", ["target", "rate", "threshold"])
    if mode == "target":
        fields["schedule"] = trial.suggest_categorical("schedule", ["linear", "exponential", "cubic", "cosine"])
        fields["initial_sparsity"] = trial.suggest_float("initial_sparsity", 0.0, 0.3)
        fields["target_sparsity"] = trial.suggest_float("target_sparsity", 0.4, 0.9)
        fields["num_rounds"] = trial.suggest_int("num_rounds", 3, 8)
        fields["scope"] = trial.suggest_categorical("scope", ["global", "layer"])
    elif mode == "rate":
        fields["schedule"] = "constant"
        fields["rate"] = trial.suggest_categorical("rate", [0.1, 0.2, 0.3])
        fields["num_rounds"] = trial.suggest_int("num_rounds", 4, 9)
    else:
        fields["schedule"] = "linear"
        fields["threshold"] = trial.suggest_float("threshold", 0.3, 1.5)
        fields["threshold_unit"] = "std"
        fields["num_rounds"] = trial.suggest_int("num_rounds", 3, 6)
    return fields
