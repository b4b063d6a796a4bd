"""ZeRO 1 to 3: the one door to deepspeed, and to its private layout.

pyproject.toml pins the version, and tests/training/test_engine.py holds the invariant of masks for every stage.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from raysearch.models.architectures import architecture
from raysearch.models.model import parameter_shape
from raysearch.training.optimizer import SparseAdamW

BUCKET = 1 << 26
"""Gradients that are reduced at once, and the size of two buffers for them."""


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


class Sharded:
    """The module under DeepSpeed; of `replicated.Replicated`'s methods each means the same here."""

    def __init__(self, load: Callable[[], PreTrainedModel], groups_of: Callable[[PreTrainedModel], list[dict[str, Any]]],
                 stage: int, dtype: str, num_sequences: int, clip_norm: float, compiled: bool, **adamw: Any) -> None:
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(verbose=False)
        self.stage = stage
        settings = {
            "train_micro_batch_size_per_gpu": num_sequences,
            "gradient_clipping": clip_norm,
            # the linear layer that does not keep gathered weights for the backward pass is one for eager blocks: compiled ones
            # keep none, and torch 2.11 compiled it anew for each (a Llama of 7 B ran eagerly from the ninth block on)
            "zero_optimization": {"stage": stage, "round_robin_gradients": False, "reduce_bucket_size": BUCKET,
                                  "memory_efficient_linear": not compiled},
            # bf16 has fp32's range; the check takes six kernels and a conversion for every parameter
            "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": False},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if stage > 1:  # stage 1 would do so through another class, whose layout is another
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        self._settings = settings
        model = self._loaded(load)
        if stage == 3 and (known := architecture(model)) is not None:  # a block is gathered as a whole, between two graphs
            deepspeed.utils.set_z3_leaf_modules_by_name(
                model, [f"{known.blocks}.{index}" for index in range(len(model.get_submodule(known.blocks)))])
        self.optimizer = SparseAdamW(groups_of(model), **adamw)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=settings)
        self.module: PreTrainedModel = self._engine.module
        # DeepSpeed's own norm takes three kernels and a conversion for every parameter
        if stage == 3:
            self._optimizer._get_norm_groups = lambda: [self._norm()]
        else:
            self._optimizer.scaled_global_norm = self._norm
        self._clip_norm = clip_norm

    def _loaded(self, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        partitioning: object = None
        if self.stage == 3:  # from_pretrained then loads every parameter straight into its partitions
            from transformers.integrations import HfDeepSpeedConfig

            partitioning = HfDeepSpeedConfig(self._settings)
        model = load()
        del partitioning  # while it lives every model is partitioned, also one that is loaded to be exported
        return model

    def frozen(self, load: Callable[[], PreTrainedModel]) -> nn.Module:
        """Another model beside this one, which is not trained; partitioned where this one is."""
        model = self._loaded(load).requires_grad_(False).eval()
        if self.stage < 3:
            return model.to(next(self.module.parameters()).device)
        engine: nn.Module = import_deepspeed().initialize(model=model, config=self._settings)[0]
        engine.eval()  # which returns nothing
        return engine

    def pieces(self) -> Iterator[tuple[Tensor, nn.Parameter, int, int, int]]:
        rank, optimizer = dist.get_rank(), self._optimizer
        # of each sub-group: its fp32 master, the flat buffer of weights that it mirrors, the parameters in it
        masters = (zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, optimizer.fp16_groups)
                   if self.stage == 3 else
                   zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups_flat, optimizer.bit16_groups))
        for master, low, parameters in masters:
            for parameter in parameters:
                total = torch.Size(parameter_shape(parameter)).numel()
                if self.stage == 3:
                    partition = parameter.ds_tensor
                    offset = (partition.data_ptr() - low.data_ptr()) // low.itemsize
                    start = rank * partition.numel()
                    length = min(partition.numel(), total - start)  # the last rank's slice may be padded
                else:
                    offset = (parameter.data_ptr() - low.data_ptr()) // low.itemsize - rank * master.numel()
                    start = max(0, -offset)
                    offset = max(0, offset)
                    length = min(total - start, master.numel() - offset)
                if length > 0:
                    yield master, parameter, start, length, offset

    def sync(self) -> None:
        """Carries the masters to the module's weights, on all ranks."""
        optimizer = self._optimizer
        if self.stage == 3:
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        else:
            optimizer.update_lp_params()

    def forward(self, **inputs: Any) -> Tensor:
        return self._engine(**inputs)

    def train_step(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        values = []
        for index, loss in enumerate(losses):
            self._engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            value = loss()
            self._engine.backward(value / len(losses))
            values.append(value.detach())
        self._engine.step()
        return torch.stack(values).mean()

    def _norm(self) -> Tensor:
        """Of all ranks' gradients, for DeepSpeed to clip by, before the first group's step."""
        gradients = [g for group in self._optimizer.averaged_gradients.values() for g in group]
        squared = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).square().sum()
        dist.all_reduce(squared)
        norm = squared.sqrt()
        self.optimizer.clip_factor = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def save_checkpoint(self, folder: str, step: int) -> None:
        self._engine.save_checkpoint(folder, tag="checkpoint", client_state={"step": step})

    def load_checkpoint(self, folder: str) -> int:
        _, state = self._engine.load_checkpoint(folder, tag="checkpoint")
        return int(state["step"])
