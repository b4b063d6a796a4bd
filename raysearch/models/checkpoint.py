"""The weights in a model's folder: the files that transformers reads, what their headers say, and names that wrappers left."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor, dtype

NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""torch's names for those of safetensors."""
INDEX = "model.safetensors.index.json"
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
"""What torch.compile, FSDP, activation checkpointing and Lightning put into names, at any depth."""
OLD_BUFFERS = re.compile(r"(attn\.bias|attention\.bias|masked_bias|inv_freq|position_ids)$")
"""Masks and tables that older versions of transformers stored, and newer ones compute: nobody misses them."""


class Stored(NamedTuple):
    """A tensor's entry in a header."""

    file: Path
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    num_weights: int


def model_folder(path: str) -> Path:
    """The folder, checked: ValueError of one sentence unless it holds a model that can be loaded without a network."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"model {path}: no such folder; give a local folder in Hugging Face's format "
                         "(config.json and safetensors), for example one that `raysearch pretrain` wrote")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {path}: config.json is missing, so this is not a Hugging Face model folder")
    if (generation := folder / "generation_config.json").is_file():  # transformers would make up another one
        try:
            json.loads(generation.read_bytes())
        except ValueError as error:
            raise ValueError(f"model {path}: {generation.name} is damaged ({error}); fetch it again, or delete it") from error
    if not list(folder.glob("*.safetensors")):
        weight_files(folder)  # says what is missing
    return folder.resolve()


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers reads: model.safetensors, else the shards of its index; others that lie there are nobody's.
    ValueError of one sentence where there are none."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
            files = [folder / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"model {folder}: {INDEX} is no index of shards ({error}); fetch it again") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"model {folder}: {', '.join(missing[:3])} of its {len(files)} shards is missing; fetch it again")
        return files
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"model {folder}: holds an adapter and no model; merge it into its base model first (peft's "
                         "merge_and_unload), and save that")
    raise ValueError(f"model {folder}: no .safetensors file in it that transformers would read (model.safetensors, or {INDEX} "
                     "with its shards); pickled weights are not read, so convert them with save_pretrained first")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of the folder by name, from the headers alone; ValueError of one sentence for a damaged file."""
    tensors = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    part = opened.get_slice(name)
                    tensors[name] = Stored(file, part.get_dtype(), math.prod(part.get_shape()))
        except (SafetensorError, OSError) as error:
            fault = _damage(file, error)
            raise ValueError(f"model {folder}: cannot be loaded, for {file.name} {fault}; fetch it again") from error
    return tensors


def _damage(file: Path, error: Exception) -> str:
    with open(file, "rb") as content:
        start = content.read(100)
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the weights (`git lfs pull` brings them)"
    return f"is damaged or cut short ({error})" if start else "is empty"


def dtypes(tensors: Iterable[Stored]) -> Counter[str]:
    """Number of weights of each floating-point type."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if "F" in tensor.dtype:
            counts[tensor.dtype] += tensor.num_weights
    return counts


def unwrapped(names: Iterable[str], model: Any) -> dict[str, str]:
    """{stored name: name without what wrappers put before it}, for names that do not fit `model`.

    Besides WRAPPERS, a first part that all names share goes where the next ones are the model's own: `module.` of DDP and
    DeepSpeed, `model.` of Lightning, and whatever a training script's own class calls the model in it.
    """
    short = {name: WRAPPERS.sub("", name) for name in names}
    tops, bodies = ({name for name, _ in each.named_children()} for each in (model, model.base_model))
    while short:
        firsts = {name.partition(".")[0] for name in short.values()}
        seconds = {name.partition(".")[2].partition(".")[0] for name in short.values()}
        if len(firsts) > 1 or "" in seconds or (firsts <= tops | bodies and not seconds <= tops):
            break
        short = {name: rest.partition(".")[2] for name, rest in short.items()}
    return short


def read_tensors(tensors: dict[str, Stored]) -> Iterator[tuple[str, "Tensor"]]:
    """One after the other, with its name."""
    for file in {stored.file for stored in tensors.values()}:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                yield name, opened.get_tensor(name)


class Base:
    """Parts of a model's tensors that can be restored: from its files, which a node has in memory once whoever maps them, and
    from copies of those parts that no file has under their name or in their form.

    `parts`: (name, flat index of the first weight, weights [n]) of each, as they were loaded in `dtype`.
    """

    def __init__(self, path: str, parts: "Sequence[tuple[str, int, Tensor]]", dtype: "dtype") -> None:
        self._folder, self._parts, self._dtype = model_folder(path), parts, dtype
        self._tensors, self._files = stored_tensors(self._folder), self._look()
        own = (values.to("cpu", dtype, copy=True) for *_, values in parts)
        self._copies = [None if (there := self._stored(part)) is not None and there.equal(copy) else copy
                        for part, copy in zip(parts, own)]

    def _look(self) -> list[tuple[Path, int, int]]:
        return [(file, file.stat().st_mtime_ns, file.stat().st_size) for file in weight_files(self._folder)]

    def _stored(self, part: "tuple[str, int, Tensor]") -> "Tensor | None":
        """On the CPU; None where no file has a tensor of that name. What is not of the part is not read."""
        name, start, values = part
        if name not in self._tensors:
            return None
        with safe_open(self._tensors[name].file, "pt") as opened:
            whole: Tensor = opened.get_tensor(name)
            return whole.reshape(-1)[start:start + values.numel()].to(self._dtype)

    def restore(self) -> None:
        """Writes the weights of all parts as they were; ValueError of one sentence where the files have changed meanwhile."""
        if self._look() != self._files:
            raise ValueError(f"model {self._folder}: its weights have changed while they are in use; put those back with which "
                             "the study began, or begin another study")
        for part, copy in zip(self._parts, self._copies):
            values = self._stored(part) if copy is None else copy
            assert values is not None, "it was there"
            part[-1].copy_(values)


def check_finite(path: str, tensors: Iterable[tuple[str, "Tensor"]]) -> None:
    """ValueError of one sentence for the first that holds a NaN or an infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            low, high = tensor.detach().aminmax()  # both are NaN where one value is
            if not (low.isfinite() and high.isfinite()):
                number = int((~tensor.detach().isfinite()).sum())
                raise ValueError(f"model {path}: {name} holds {number} of {tensor.numel()} values that are NaN or infinite; "
                                 "its training diverged, so take an earlier checkpoint")
