"""A study on a random GPT-2, for benchmarks that need neither downloads nor a trained model.

The weights are random but for one direction in which the final norm's bias and the embeddings of the bytes agree, so that
the model knows which tokens occur: `check_quality` refuses a model that is no better than a uniform guess.
"""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedTokenizerFast

from raysearch.training.presets import PRESETS

MODELS = {"tiny": "tiny", "gpt2-124m": "gpt2-small"}
WORDS = ("the", "a", "dog", "cat", "fox", "saw", "ran", "red", "old", "big", "near", "river", "house", "and", "then", "it",
         "was", "over", "hill", "home", "night", "cold")


def save_byte_tokenizer(folder: Path) -> int:
    """256 byte tokens and <|endoftext|>; returns their number."""
    vocab = {token: index for index, token in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return len(vocab)


def model_folder(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """A random model of one of MODELS, made in `folder`; any other name is a folder that is there already."""
    if name not in MODELS:
        return Path(name).resolve()
    torch.manual_seed(0)
    num_tokens = save_byte_tokenizer(folder)
    model = GPT2LMHeadModel(PRESETS[MODELS[name]].config())
    direction = torch.nn.functional.normalize(torch.randn(model.config.n_embd), dim=0)
    with torch.no_grad():
        model.transformer.wte.weight[:num_tokens] += 0.5 * direction
        model.transformer.ln_f.bias.copy_(10 * direction)
    model.to(dtype).save_pretrained(folder)
    return folder


def space(trial: Any) -> dict[str, Any]:
    """One round to any sparsity, trained after it."""
    return {"target_sparsity": trial.suggest_float("target_sparsity", 0.3, 0.9), "finetune_epochs": 1.0,
            "learning_rate": 1e-4}


def num_parameters(folder: Path) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(GPT2LMHeadModel.config_class.from_pretrained(folder)).num_parameters()


def write_corpus(path: Path, num_documents: int = 2000, num_words: int = 400) -> Path:
    """Documents of random words, separated as a .txt corpus is."""
    rng = random.Random(0)
    documents = (" ".join(rng.choices(WORDS, k=num_words)) + "." for _ in range(num_documents))
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path
