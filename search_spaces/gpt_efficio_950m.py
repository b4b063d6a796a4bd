"""GPT-Efficio's size, 950 M parameters: the paper's model and its six hyper-parameters, on GPUs.

The paper's weights are not public; `raysearch pretrain --preset gpt-efficio-950m --corpus CORPUS --out
/shared/models/gpt-efficio-950m` trains a GPT-2 of that size. Ranks and ZeRO stage are what fits.
"""

from search_spaces import magnitude

STUDY = {
    **magnitude.STUDY,
    "model": {"path": "/shared/models/gpt-efficio-950m", "dtype": "bfloat16"},
    "data": {"corpus": "/shared/data/finetune", "context_tokens": 1024, "epoch_tokens": 20_971_520},
    "training": {"batch_tokens": 131_072},
    "evaluation": {"tasks": ("text", "lambada", "hellaswag", "storycloze", "nq_open", "webqs", "triviaqa"),
                   "data_dir": "/shared/data", "num_items": 1000},
    "search": {**magnitude.STUDY["search"], "max_concurrent": 8},
    "cluster": {"num_ranks": "auto", "zero_stage": "auto", "gpus_per_rank": 1.0, "cpus_per_rank": 4.0},
}
space = magnitude.space
