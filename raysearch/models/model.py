"""Models: load a Hugging Face causal LM, say which weights may be pruned, count them.

GPT-2's `Conv1D` keeps its weight as [in, out] where `nn.Linear` has [out, in]; `Prunable.transposed` says so, and
nothing outside this file needs to know more.
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from raysearch.study.files import file_sha256

transformers.logging.disable_progress_bar()  # of a second at most, in every log


@dataclass(frozen=True)
class Prunable:
    """One tensor that pruning may change."""

    name: str
    """Name in `named_parameters()`; tied weights appear once."""
    shape: tuple[int, ...]
    transposed: bool
    """True where the weight is [in, out]: its output units are columns."""


@dataclass(frozen=True)
class ModelSize:
    num_parameters: int
    """Tied weights count once."""
    hidden_size: int
    num_layers: int
    vocab_size: int


def model_folder(path: str) -> Path:
    """The folder, checked: ValueError of one sentence unless it holds a model that can be loaded without a network."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"model {path}: no such folder; give a local folder in Hugging Face's format "
                         "(config.json and safetensors), for example one that `raysearch pretrain` wrote")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {path}: config.json is missing, so this is not a Hugging Face model folder")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"model {path}: no .safetensors file in it; pickled weights are not read, "
                         "so convert them with save_pretrained first")
    return folder.resolve()


def load_model(path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model on the CPU in `dtype`, in eval mode; ValueError of one sentence when it cannot be loaded."""
    folder = model_folder(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged folder
        raise ValueError(f"model {path}: cannot be loaded ({_first_line(error)}); "
                         "the folder must hold a causal language model in safetensors") from error
    return model.eval()


def multiply_in_fp32(model: nn.Module) -> None:
    """From now on the linear layers compute as tensor cores do, bf16 in and out and fp32 between, by way of fp32 products: for
    CPUs without bf16 arithmetic, where torch's own take up to 130 times as long (Conv1D of 512 x 2048, 2026-11-25)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.forward = functools.partial(_fp32_product, module)


def _fp32_product(module: nn.Linear | Conv1D, x: Tensor) -> Tensor:
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    bias = None if module.bias is None else module.bias.float()
    return nn.functional.linear(x.float(), weight.float(), bias).to(x.dtype)


def from_config(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose parameters have shapes and no memory ("meta"), for a caller that puts its own in."""
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def model_size(path: str) -> ModelSize:
    """Counted on the folder's configuration; its weights are not read."""
    return size_of(load_config(path))


def size_of(config: PretrainedConfig) -> ModelSize:
    model = from_config(config, torch.float32)
    model.tie_weights()
    return ModelSize(sum(parameter.numel() for parameter in model.parameters()), config.hidden_size,
                     config.num_hidden_layers, config.vocab_size)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    folder = model_folder(path)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        raise ValueError(f"model {path}: its tokenizer cannot be loaded ({_first_line(error)}); "
                         "save the tokenizer into the same folder") from error


def fingerprint(path: str) -> str:
    """First 16 hex digits of a hash over the folder's configuration, weights and tokenizer."""
    folder = model_folder(path)
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json", *folder.glob("tokenizer*.json")]):
        digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()[:16]


def stored_dtype(path: str) -> str:
    """"bfloat16" where the folder's first tensor is, else "float32": fp16 and fp64 weights are pruned in fp32."""
    with safe_open(min(model_folder(path).glob("*.safetensors")), "pt") as file:
        names = list(file.keys())
        return "bfloat16" if names and file.get_slice(names[0]).get_dtype() == "BF16" else "float32"


def load_config(path: str) -> PretrainedConfig:
    """The folder's configuration; ValueError of one sentence when it is none that transformers knows."""
    try:
        return AutoConfig.from_pretrained(model_folder(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {path}: its config.json cannot be read ({_first_line(error)})") from error


def context_limit(config: PretrainedConfig) -> float:
    """Longest input in tokens that the configuration allows; infinite where it names none."""
    return getattr(config, "max_position_embeddings", None) or math.inf


def parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape, also where ZeRO-3 has partitioned the parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def prunable_parameters(model: PreTrainedModel, which: str) -> list[Prunable]:
    """Weights that may be pruned, in `named_parameters()` order.

    `which`: "matrices" for the attention and MLP matrices, "all" for the embeddings too (once, when tied). Biases and
    norms never are. Raises ValueError when the model has none.
    """
    head = model.get_output_embeddings()
    transposed: dict[int, bool] = {}  # by identity of the parameter: a tied one is one
    for module in model.modules():
        linear = isinstance(module, nn.Linear | Conv1D) and module is not head
        if linear or (which == "all" and (isinstance(module, nn.Embedding) or module is head)):
            transposed[id(module.weight)] = isinstance(module, Conv1D)
    if which != "all" and head is not None:
        transposed.pop(id(head.weight), None)
    prunables = [Prunable(name, parameter_shape(parameter), transposed[id(parameter)])
                 for name, parameter in model.named_parameters() if id(parameter) in transposed]
    if not prunables:
        raise ValueError(f"{type(model).__name__} has no nn.Linear or Conv1D weight to prune")
    return prunables


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
