"""The one door to deepspeed: sharded training that keeps masks, with nothing gathered (DESIGN section 5).

DeepSpeed calls `step()` of the wrapped torch optimizer on the fp32 master shards and copies to the module's weights
after it. So the mask lives beside the shard, in its layout, and is applied at the end of that `step()`: on ZeRO 0 to 3
the module then holds exactly the mask's zeros. A pruned weight is a zero among the prunable weights and nothing else,
so the mask never needs a copy of its own: it is read off the weights when they are loaded or pruned.

Private names of DeepSpeed are used in `_masters` and `_sync` only; pyproject.toml pins the version, and
tests/test_engine.py holds the invariant for every stage.
"""

import importlib
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from raysearch.kernels import SparseWeight
from raysearch.models.model import Prunable, load_model, multiply_in_fp32, parameter_shape, prunable_parameters
from raysearch.training.optimizer import SparseAdamW

T = TypeVar("T")


def import_deepspeed() -> ModuleType:
    """DeepSpeed, quiet, and without the shared-memory op that it would compile (and fail without a compiler)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed

    backend = importlib.import_module("deepspeed.comm.torch")  # the attribute of that name is torch itself
    backend.build_shm_op = lambda: None
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Shard:
    """The part of one parameter that this rank owns."""

    name: str
    index: int
    """Position of the parameter among all of them; shards are sorted by it."""
    start: int
    """Flat index of the shard's first weight in the parameter."""
    values: Tensor
    """[n] fp32, a view into the master shard: writing here writes the weight (`Engine.sync` carries it on)."""


class Engine:
    """A causal LM under DeepSpeed, as shards of fp32 master weights that can be read, written, masked and trained.

    The ranks are those of torch.distributed's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK), one
    rank where there is none. All methods are collective: every rank calls them in the same order.

    `base` are the dense model's whole tensors by parameter name, in `dtype`, on the CPU: they are kept and only read, so
    the ranks of a node may map the same memory. With None the engine keeps a copy of its own shards.
    """

    def __init__(self, model_path: str, *, prunable: str, zero_stage: int, dtype: str, batch_tokens: int,
                 context_tokens: int, weight_decay: float, timeout_s: float = 1800.0,
                 base: Mapping[str, Tensor] | None = None) -> None:
        deepspeed = import_deepspeed()
        cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        if "RANK" not in os.environ and not dist.is_initialized():  # a world of one needs no port and no environment
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for this one
            dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=timedelta(seconds=timeout_s))
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.zero_stage = zero_stage
        self.sequences_per_rank = batch_tokens // context_tokens // self.world_size
        settings = {
            "train_micro_batch_size_per_gpu": self.sequences_per_rank,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": zero_stage, "round_robin_gradients": False},
            "bf16": {"enabled": dtype == "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if zero_stage == 3:  # from_pretrained then loads every parameter straight into its partitions
            from transformers.integrations import HfDeepSpeedConfig

            self._hf_config = HfDeepSpeedConfig(settings)
        model: PreTrainedModel = load_model(model_path, getattr(torch, dtype))
        if dtype == "bfloat16" and not cuda and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            multiply_in_fp32(model)
        self.prunables: list[Prunable] = prunable_parameters(model, prunable)
        names = {p.name for p in self.prunables}
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.shapes = {name: parameter_shape(p) for name, p in self.parameters.items()}
        groups = {
            "prunable": ([p for n, p in self.parameters.items() if n in names], weight_decay),
            "matrices": ([p for n, p in self.parameters.items() if n not in names and len(self.shapes[n]) > 1],
                         weight_decay),
            "vectors": ([p for n, p in self.parameters.items() if n not in names and len(self.shapes[n]) < 2], 0.0),
        }
        self.optimizer = SparseAdamW(
            [{"name": name, "params": params, "weight_decay": decay} for name, (params, decay) in groups.items() if params],
            lr=0.0, betas=(0.9, 0.95), fused=True)
        self.deepspeed_engine, self._ds_optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings)
        self.model: PreTrainedModel = self.deepspeed_engine.module
        self.device = self.deepspeed_engine.device
        self.shards = self._shards()
        self.prunable_shards = [shard for shard in self.shards if shard.name in names]
        self._base = [base[shard.name].reshape(-1)[shard.start:shard.start + shard.values.numel()] if base
                      else shard.values.to("cpu", getattr(torch, dtype), copy=True) for shard in self.shards]
        self.read_masks()

    # ---- masters: the adapter to DeepSpeed's private layout ----

    def _masters(self) -> list[tuple[Tensor, Tensor | None, list[nn.Parameter]]]:
        """(fp32 master, the flat low-precision buffer it mirrors or None, the parameters in it) per sub-group."""
        optimizer = self._ds_optimizer
        if self.zero_stage == 3:
            return list(zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat,
                            optimizer.fp16_groups))
        if self.zero_stage in (1, 2):
            return list(zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups_flat,
                            optimizer.bit16_groups))
        low = [p for group in getattr(optimizer, "fp16_groups", []) for p in group]
        high = [p for group in getattr(optimizer, "fp32_groups", []) for p in group]
        if low:  # stage 0 in bf16: one fp32 copy per parameter
            return [(master, None, [p]) for p, master in zip(low, high)]
        return [(p, None, [p]) for p in self.parameters.values()]

    def _shards(self) -> list[Shard]:
        name_of = {id(p): name for name, p in self.parameters.items()}
        index_of = {name: index for index, name in enumerate(self.parameters)}
        shards = []
        for master, low, parameters in self._masters():
            flat = master.detach().view(-1)
            for parameter in parameters:
                name = name_of[id(parameter)]
                total = torch.Size(self.shapes[name]).numel()
                if low is None:
                    offset, start, length = 0, 0, total
                elif self.zero_stage == 3:
                    partition = parameter.ds_tensor
                    offset = (partition.data_ptr() - low.data_ptr()) // low.itemsize
                    start = self.rank * partition.numel()
                    length = min(partition.numel(), total - start)  # the last rank's slice may be padded
                else:
                    offset = (parameter.data_ptr() - low.data_ptr()) // low.itemsize - self.rank * flat.numel()
                    start = max(0, -offset)
                    offset = max(0, offset)
                    length = min(total - start, flat.numel() - offset)
                if length > 0:
                    shards.append(Shard(name, index_of[name], start, flat[offset:offset + length]))
        return sorted(shards, key=lambda shard: shard.index)

    def sync(self) -> None:
        """Carries the fp32 masters to the module's weights, on all ranks."""
        optimizer = self._ds_optimizer
        if self.zero_stage == 3:
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self.zero_stage in (1, 2):
            optimizer.update_lp_params()
        else:
            with torch.no_grad():
                for master, _, (parameter,) in self._masters():
                    parameter.copy_(master)

    # ---- weights and masks ----

    @property
    def sharded(self) -> bool:
        return self.zero_stage > 0 and self.world_size > 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that own different weights; `tensor` itself where every rank owns all of them."""
        if self.sharded:
            dist.all_reduce(tensor)
        return tensor

    @property
    def shard_rank(self) -> tuple[int, int]:
        """(rank, world size) among the ranks that own different weights."""
        return (self.rank, self.world_size) if self.sharded else (0, 1)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor | SparseWeight]) -> None:
        """Writes whole tensors (by parameter name, any float dtype) into the shards; zeros become the mask. Sparse ones are
        expanded on the engine's device, one at a time."""
        for shard in self.shards:
            whole = weights[shard.name]
            if isinstance(whole, SparseWeight):
                whole = whole.moved(lambda values: values.to(self.device)).to_dense()
            flat = whole.reshape(-1)
            shard.values.copy_(flat[shard.start:shard.start + shard.values.numel()])
        self.read_masks()
        self.sync()

    @torch.no_grad()
    def load_base(self) -> None:
        """Copies this rank's shards of the dense model back: how a warm gang starts its next trial."""
        for shard, values in zip(self.shards, self._base):
            shard.values.copy_(values.to(self.device))
        self.read_masks()
        self.sync()

    @torch.no_grad()
    def gather(self, name: str) -> Tensor:
        """The whole fp32 master of one parameter, in its shape, on every rank."""
        whole = torch.zeros(torch.Size(self.shapes[name]).numel(), device=self.device)
        for shard in self.shards:
            if shard.name == name:
                whole[shard.start:shard.start + shard.values.numel()] = shard.values
        return self.all_reduce(whole).view(self.shapes[name])

    @torch.no_grad()
    def prune(self, keep: Sequence[Tensor]) -> None:
        """Zeroes the weights where `keep` (one bool tensor for each of `prunable_shards`) is False, for good."""
        for shard, mask in zip(self.prunable_shards, keep):
            shard.values.masked_fill_(~mask, 0)
        self.read_masks()
        self.sync()

    def read_masks(self) -> None:
        """Every zero among the prunable weights is pruned from now on, a shard's padding too."""
        names = {p.name for p in self.prunables}
        name_of = {id(p): name for name, p in self.parameters.items()}
        dtype = torch.bool if self.device.type == "cuda" else torch.float32
        self.optimizer.keep = {master: (master.detach() != 0).to(dtype) for master, _, parameters in self._masters()
                               if name_of[id(parameters[0])] in names}

    @torch.no_grad()
    def nonzero_counts(self) -> dict[str, int]:
        """Non-zero weights of every parameter, over all ranks."""
        counts = torch.zeros(len(self.parameters), dtype=torch.int64, device=self.device)
        for shard in self.shards:
            counts[shard.index] += torch.count_nonzero(shard.values)
        return dict(zip(self.parameters, self.all_reduce(counts).tolist()))

    # ---- training ----

    def restart(self, l1_lambda: float) -> None:
        """A fresh optimizer: no moments, step 0, the masks as they are."""
        self.optimizer.restart()
        self.optimizer.l1_lambda = l1_lambda

    def train_step(self, tokens: Tensor, learning_rate: float) -> Tensor:
        """One optimizer step on this rank's `tokens` [sequences, context]; this rank's loss, nats per token."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        tokens = tokens.to(self.device)
        loss = self.deepspeed_engine(input_ids=tokens, labels=tokens).loss
        self.deepspeed_engine.backward(loss)
        self.deepspeed_engine.step()
        return loss.detach()

    def mean(self, value: Tensor) -> float:
        """Mean over the ranks of one number."""
        value = value.detach().float().to(self.device)
        dist.all_reduce(value)
        return float(value) / self.world_size

    def from_rank_0(self, compute: Callable[[], T]) -> T:
        """What `compute` returns on rank 0, on every rank; when it raises there, every rank raises."""
        if self.world_size == 1:
            return compute()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer = [compute(), None]
            except Exception as error:
                answer = [None, error]
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return cast(T, answer[0])

    def gather_objects(self, value: object) -> list[object]:
        """The ranks' values, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values
