"""Models: load a Hugging Face causal LM, say which weights may be pruned, count them.

GPT-2's `Conv1D` keeps its weight as [in, out] where `nn.Linear` has [out, in]; `Prunable.transposed` says so, and
nothing outside this file needs to know more.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
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

from raysearch.models.checkpoint import (
    NAMES,
    OLD_BUFFERS,
    Stored,
    check_finite,
    dtypes,
    model_folder,
    read_tensors,
    stored_tensors,
    unwrapped,
    weight_files,
)
from raysearch.study.files import file_sha256
from raysearch.study.text import first_line

EXPERTS_IN_OUT = ("Llama4TextExperts",)
"""Experts stored [in, out] that do not say so by `is_transposed`."""
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "context_length", "n_ctx")
"""Names that families give the number of positions."""

transformers.logging.disable_progress_bar()  # of a second at most, in every log


@dataclass(frozen=True)
class Prunable:
    """One tensor that pruning may change."""

    name: str
    """Name in `named_parameters()`; tied weights appear once."""
    shape: tuple[int, ...]
    transposed: bool
    """True where the weight is [in, out]: its output units are columns. Of experts each one is."""

    def rows(self, whole: Tensor) -> Tensor:
        """The weight, in its shape or flat, as [outputs, inputs]; the experts' outputs one after the other."""
        stored = whole.view(-1, *self.shape[-2:])
        return (stored.mT if self.transposed else stored).reshape(-1, self.shape[-2 if self.transposed else -1])

    def stored(self, rows: Tensor) -> Tensor:
        """What `rows` gave, in the order in which the parameter is stored, flat."""
        if not self.transposed:
            return rows.reshape(-1)
        return rows.view(-1, self.shape[-1], self.shape[-2]).mT.reshape(-1)


@dataclass(frozen=True)
class ModelSize:
    num_parameters: int
    """Tied weights count once."""
    hidden_size: int
    num_layers: int
    vocab_size: int


def check_model(path: str, dtype: torch.dtype) -> None:
    """ValueError of one sentence where `load_model` would raise one, with one tensor in memory at a time."""
    load_model(path, dtype, "meta")
    check_finite(path, ((name, tensor.to(dtype)) for name, tensor in read_tensors(stored_tensors(model_folder(path)))
                        if not OLD_BUFFERS.search(name)))


def load_model(path: str, dtype: torch.dtype = torch.float32, device: str | None = None) -> PreTrainedModel:
    """The model on the CPU in `dtype`, in eval mode, with every weight from its files; names that wrappers left are mended.
    On the device "meta" nothing is read but the files' headers.

    ValueError of one sentence when it cannot be loaded, when a weight is missing, left over or of another shape, since
    transformers would make up a random one, and when one is not finite.
    """
    folder = model_folder(path)
    stored = stored_tensors(folder)
    load = functools.partial(_loaded, path, stored, dtype=dtype, device_map=device)
    model, misfit = load(functools.partial(AutoModelForCausalLM.from_pretrained, folder))
    if misfit and (names := unwrapped(stored, model)) != {name: name for name in stored}:
        generation, weights = model.generation_config, {names[name]: tensor for name, tensor in read_tensors(stored)}
        model, misfit = load(functools.partial(type(model).from_pretrained, None, config=load_config(path), state_dict=weights))
        model.generation_config = generation
    if misfit:
        raise ValueError(f"model {path}: its weights are not those of the {type(model).__name__} in its config.json: {misfit}; "
                         "give the config.json that belongs to them, or save the whole model again")
    check_finite(path, model.state_dict().items())  # without tables made anew, in which an infinity may be meant
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # also where config.json says they are one, and the file holds two
    return model.eval()


def _loaded(path: str, stored: Mapping[str, Stored], from_pretrained: Callable[..., Any], **how: Any
            ) -> tuple[PreTrainedModel, str]:
    """(the model, what of its weights does not fit, empty where all does)."""
    try:
        model, report = from_pretrained(trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **how)
    except Exception as error:  # transformers raises many kinds for a damaged folder
        raise ValueError(f"model {path}: cannot be loaded ({first_line(error)}); "
                         "the folder must hold a causal language model in safetensors") from error
    parts = [("missing", sorted(report["missing_keys"])),
             ("left over", sorted(name for name in report["unexpected_keys"] if not OLD_BUFFERS.search(name))),
             ("of another shape", sorted(f"{name} {list(found)} instead of {list(wanted)}"
                                         for name, found, wanted in report["mismatched_keys"])),
             ("of whole numbers, as of a quantised model", sorted(name for name, _ in model.named_parameters()
                                                                  if name in stored and "F" not in stored[name].dtype))]
    return model, ", and ".join(f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                                for what, names in parts if names)


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """ValueError of one sentence unless tokens alone give logits, none of which depends on a later token: Hugging Face also
    loads BERT and XLNet as causal models, and their scores would look too good. Collective where the model is."""
    size = vocab_size(model.config)
    tokens = torch.arange(8, device=model.device)[None] % size
    try:
        first, second = (model(input_ids=each, use_cache=False).logits[0, :-1].float()
                         for each in (tokens, tokens.index_fill(1, tokens.new_tensor([7]), 8 % size)))
    except Exception as error:  # each family's code raises its own
        raise ValueError(f"{type(model).__name__} gives no logits for tokens alone ({first_line(error)}); give a causal "
                         "language model") from error
    tolerance = 1e-5 if model.dtype.itemsize > 2 else 0.02  # of what rounds otherwise; equal in every bit for most families
    if (first - second).abs().max() > tolerance * first.abs().max():
        raise ValueError(f"{type(model).__name__} looks ahead: its logits for a token depend on later ones, so it is no causal "
                         "language model; give one, or set is_decoder in its config.json")


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
    """A model whose parameters have shapes and no memory ("meta"), for a caller that puts its own in; tied ones are one."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    """On the GPU where there is one; on a CPU in fp32, which is faster there than bf16 and more exact."""
    if torch.cuda.is_available():
        return model.to("cuda")
    return model.float() if model.dtype == torch.bfloat16 else model


def model_size(path: str) -> ModelSize:
    """Counted on the folder's configuration; its weights are not read."""
    return size_of(load_config(path))


def size_of(config: PretrainedConfig) -> ModelSize:
    model = from_config(config, torch.float32)
    return ModelSize(sum(parameter.numel() for parameter in model.parameters()), config.hidden_size,
                     config.num_hidden_layers, config.vocab_size)


def num_weights(path: str, prunable: str) -> tuple[int, int]:
    """(all parameters, the prunable ones) of the model in this folder, from its configuration alone."""
    model = from_config(load_config(path), torch.float32)
    return (sum(parameter.numel() for parameter in model.parameters()),
            sum(math.prod(each.shape) for each in prunable_parameters(model, prunable)))


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """ValueError of one sentence where the folder has none: transformers would make up an empty one."""
    folder = model_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        raise ValueError(f"model {path}: its tokenizer cannot be loaded ({first_line(error)}); "
                         "save the tokenizer into the same folder") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(f"model {path}: its tokenizer has no tokens, or its files are missing; save the tokenizer into the "
                         "same folder")
    return tokenizer


def fingerprint(path: str) -> str:
    """First 16 hex digits of a hash over the folder's configuration, weights and tokenizer."""
    folder = model_folder(path)
    digest = hashlib.sha256()
    for file in sorted([*weight_files(folder), folder / "config.json", *folder.glob("tokenizer*.json")]):
        digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()[:16]


def stored_dtype(path: str) -> str:
    """"bfloat16" where most of the folder's weights are, else "float32": fp16 and fp64 are pruned in fp32 (`dtype_note`)."""
    counts = dtypes(stored_tensors(model_folder(path)).values())
    return "bfloat16" if counts and counts.most_common(1)[0][0] == "BF16" else "float32"


def dtype_note(path: str, dtype: str) -> str | None:
    """A sentence where the folder's weights are of other types than `dtype`, in which they are used and exported."""
    counts = dtypes(stored_tensors(model_folder(path)).values())
    others = [NAMES.get(name, name) for name, _ in counts.most_common() if NAMES.get(name, name) != dtype]
    if not others:
        return None
    return f"the model's weights are stored in {' and '.join(others)}; here, and in an export, they are {dtype}"


def load_config(path: str) -> PretrainedConfig:
    """The folder's configuration; ValueError of one sentence when it is none that transformers knows."""
    folder = model_folder(path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration is code, and each family's raises its own
        raise ValueError(f"model {path}: its config.json cannot be read ({first_line(error)})") from error


def context_limit(config: PretrainedConfig) -> float:
    """Longest input in tokens that the configuration allows; infinite where it names none."""
    text = config.get_text_config()
    return next((limit for name in LIMITS if (limit := getattr(text, name, None) or 0) > 0), math.inf)


def vocab_size(config: PretrainedConfig) -> int:
    """Of the text, where the configuration has other parts too."""
    return int(config.get_text_config().vocab_size)


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
        linear = is_linear(module) and module is not head
        if linear or (which == "all" and (isinstance(module, nn.Embedding) or module is head)):
            transposed[id(module.weight)] = isinstance(module, Conv1D)
        transposed |= {id(parameter): is_transposed for parameter, is_transposed in _experts(module)}
    if which != "all" and head is not None:
        transposed.pop(id(head.weight), None)
    prunables = [Prunable(name, parameter_shape(parameter), transposed[id(parameter)])
                 for name, parameter in model.named_parameters() if id(parameter) in transposed]
    if not prunables:
        raise ValueError(f"{type(model).__name__} has no nn.Linear or Conv1D weight to prune")
    return prunables


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer and nothing more: some routers are an nn.Linear whose forward also chooses the experts."""
    return isinstance(module, nn.Linear | Conv1D) and (type(module).forward in (nn.Linear.forward, Conv1D.forward)
                                                       or type(module).__name__ == "FalconLinear")


def _experts(module: Any) -> Iterator[tuple[nn.Parameter, bool]]:
    """(weights of all experts of a layer in one parameter, whether they are stored [in, out]); nothing for other modules.

    Most families keep them as [experts, out, in], some as [experts, in, out], and DBRX as [experts * units, hidden].
    """
    if "num_experts" in (attributes := vars(module)) or "moe_num_experts" in attributes:
        for name, parameter in module.named_parameters(recurse=False):
            if type(module).__name__ == "DbrxExpertGLU":
                yield parameter, name == "w2"
            elif len(parameter_shape(parameter)) == 3:
                yield parameter, getattr(module, "is_transposed", type(module).__name__ in EXPERTS_IN_OUT)
