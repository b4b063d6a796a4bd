"""Sharded training that keeps masks, with nothing gathered.

Masks, and whatever else belongs to single weights, live beside the fp32 masters, in their layout; the optimizer's step
applies them (optimizer.py). Outside that step one invariant holds for every method and every ZeRO stage: a pruned weight is
0 in the master, in the module and in the file. Where the masters lie is the layout's affair: `replicated.py` at stage 0,
`zero.py` (DeepSpeed) at the others.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from raysearch.cluster.placement import MicroBatch
from raysearch.kernels import SparseWeight
from raysearch.models.checkpoint import Base
from raysearch.models.model import Prunable, load_model, multiply_in_fp32, parameter_shape, prunable_parameters
from raysearch.training.hardware import Ranks
from raysearch.training.loss import Labels, Loss, as_teacher, labels_of, next_token_loss, take_loss
from raysearch.training.optimizer import Gather
from raysearch.training.replicated import Replicated
from raysearch.training.zero import Sharded

CLIP_NORM = 1.0
"""Of all gradients together, those of pruned weights included: clipped by the norm of what is kept, books-30m trained worse
(docs/log.md, 2026-11-27)."""


@dataclass(frozen=True)
class Shard:
    """The part of one parameter that this rank owns."""

    name: str
    index: int
    """Position of the parameter among all of them; shards are sorted by it."""
    start: int
    """Flat index of the shard's first weight in the parameter."""
    values: Tensor
    """[n] fp32, a view into the master: writing here writes the weight (`Engine.sync` carries it on)."""
    master: Tensor
    """The flat fp32 tensor of one of the layout's groups in which the shard lies."""
    offset: int
    """Of the shard in its master."""

    def of(self, state: Mapping[Tensor, Tensor]) -> Tensor | None:
        """The shard's part [n] of what is kept beside the masters; None where nothing is kept for its master."""
        whole = state.get(self.master)
        return None if whole is None else self.part(whole)

    def part(self, whole: Tensor) -> Tensor:
        """The shard's part [n], a view, of a tensor in its master's layout."""
        return whole.view(-1)[self.offset:self.offset + self.values.numel()]


class Engine(Ranks):
    """A causal LM as shards of fp32 master weights that can be read, written, masked and trained.

    All methods are collective: every rank calls them in the same order. The dense model stays at hand: in its files, which all
    ranks of a node map, and as a copy of a rank's own shards where a file has something under another name or in another form.
    """

    def __init__(self, model_path: str, *, prunable: str, zero_stage: int, dtype: str, batch_tokens: int,
                 context_tokens: int, weight_decay: float, timeout_s: float = 1800.0,
                 micro_batch: MicroBatch | None = None, compiled: bool = False) -> None:
        super().__init__(timeout_s)
        self.zero_stage, self.is_compiled = zero_stage, compiled
        self.sequences_per_rank = batch_tokens // context_tokens // self.world_size
        micro_batch = micro_batch or MicroBatch(batch_tokens // self.world_size, is_checkpointed=False)
        self.micro_sequences = micro_batch.tokens // context_tokens

        def load_dense() -> PreTrainedModel:
            model = load_model(model_path, getattr(torch, dtype))
            if dtype == "bfloat16" and self.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                multiply_in_fp32(model)
            return model

        def load() -> PreTrainedModel:
            model = load_dense()
            if micro_batch.is_checkpointed and model.supports_gradient_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            take_loss(model, compiled, is_partitioned=zero_stage == 3, tokens=micro_batch.tokens)
            self.prunables: list[Prunable] = prunable_parameters(model, prunable)
            self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
            self.shapes = {name: parameter_shape(p) for name, p in self.parameters.items()}
            return model

        def groups(model: PreTrainedModel) -> list[dict[str, Any]]:
            names = {p.name for p in self.prunables}
            kinds = {"prunable": weight_decay, "matrices": weight_decay, "vectors": 0.0}
            kind_of = {name: "prunable" if name in names else "matrices" if len(shape) > 1 else "vectors"
                       for name, shape in self.shapes.items()}
            found = [{"name": kind, "params": [p for name, p in self.parameters.items() if kind_of[name] == kind],
                      "weight_decay": decay} for kind, decay in kinds.items()]
            return [group for group in found if group["params"]]

        adamw = {"lr": 0.0, "betas": (0.9, 0.95), "fused": True}
        self._layout: Replicated | Sharded
        if zero_stage == 0:
            model = load()
            self._layout = Replicated(model, groups(model), CLIP_NORM, self.device, **adamw)
        else:
            is_cut = dtype == "bfloat16" and self.micro_sequences < self.sequences_per_rank  # stage 1 would add up in bf16
            self._layout = Sharded(load, groups, max(zero_stage, 1 + is_cut), dtype, self.sequences_per_rank, CLIP_NORM,
                                   compiled, **adamw)
        self.optimizer, self.model = self._layout.optimizer, cast(PreTrainedModel, self._layout.module)
        self._dense = functools.cache(lambda: self._layout.frozen(
            lambda: as_teacher(load_dense(), compiled and zero_stage < 3)))
        self._distillation: tuple[Tensor, Tensor, Tensor, bool] | None = None
        self._trainable = "all"
        self.prunable_names = {p.name for p in self.prunables}
        self.prunable_at = {list(self.shapes).index(p.name): p for p in self.prunables}
        self.shards = self._shards()
        self.prunable_shards = [shard for shard in self.shards if shard.name in self.prunable_names]
        self._positions: dict[Tensor, list[int]] = {}
        for position, shard in enumerate(self.shards):
            self._positions.setdefault(shard.master, []).append(position)
        self._by_master = {master: [self.shards[position] for position in positions]
                           for master, positions in self._positions.items()}
        self._base = Base(model_path, [(shard.name, shard.start, shard.values) for shard in self.shards], getattr(torch, dtype))
        self.set_masks(self._dense_masks())

    def _shards(self) -> list[Shard]:
        name_of = {id(p): name for name, p in self.parameters.items()}
        index_of = {name: index for index, name in enumerate(self.parameters)}
        shards = [Shard(name_of[id(parameter)], index_of[name_of[id(parameter)]], start,
                        master.detach().view(-1)[offset:offset + length], master, offset)
                  for master, parameter, start, length, offset in self._layout.pieces()]
        return sorted(shards, key=lambda shard: shard.index)

    def sync(self) -> None:
        """Carries the fp32 masters to the module's weights, on all ranks."""
        self._layout.sync()

    # ---- weights and masks ----

    @property
    def sharded(self) -> bool:
        return self.zero_stage > 0 and self.world_size > 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that own different weights; `tensor` itself where every rank owns all of them."""
        if self.sharded:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, value: Tensor) -> float:
        """The largest of the ranks' numbers."""
        if self.sharded:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)

    @property
    def shard_rank(self) -> tuple[int, int]:
        """(rank, world size) among the ranks that own different weights."""
        return (self.rank, self.world_size) if self.sharded else (0, 1)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor | SparseWeight]) -> None:
        """Writes whole weights (by parameter name, any float dtype) into the shards. The mask of a sparse one is its bitmap;
        of a prunable one that is dense it is what is not zero; others have none. Sparse ones are expanded on the engine's
        device, one at a time."""
        self.optimizer.hold_masks()  # those of a round that diverged would be added to the new weights
        masks: list[Tensor | None] = []
        whole: dict[str, tuple[Tensor, Tensor | None]] = {}
        for shard in self.shards:
            if shard.name not in whole:
                whole = {shard.name: self._expanded(shard.name, weights[shard.name])}  # of the one before nothing is kept
            here = slice(shard.start, shard.start + shard.values.numel())
            values, mask = whole[shard.name]
            shard.values.copy_(values[here])
            masks.append(None if mask is None else mask[here].clone())
        self.set_masks(masks)

    def _expanded(self, name: str, stored: Tensor | SparseWeight) -> tuple[Tensor, Tensor | None]:
        """(flat values, flat bool mask or None) of a whole parameter."""
        if isinstance(stored, SparseWeight):
            stored = stored.moved(lambda values: values.to(self.device))
            return stored.to_dense().reshape(-1), stored.mask().reshape(-1)
        flat = stored.reshape(-1)
        return flat, (flat != 0).to(self.device) if name in self.prunable_names else None

    @torch.no_grad()
    def load_base(self) -> None:
        """Copies this rank's shards of the dense model back: how a warm gang starts its next trial."""
        self.optimizer.hold_masks()
        self._base.restore()
        self.set_masks(self._dense_masks())

    def _dense_masks(self) -> list[Tensor | None]:
        """Of a model as it came: a zero among the prunable weights was pruned by somebody before, and stays so."""
        return [shard.values != 0 if shard.name in self.prunable_names else None for shard in self.shards]

    @torch.no_grad()
    def set_masks(self, masks: Sequence[Tensor | None], grows: bool = False) -> None:
        """From now on the weights where the bool mask [n] of their shard is False are pruned; one mask, or None, for each of
        `shards`. Collective.

        While masks move (`keep_latents`), a weight that is pruned leaves its value behind, and one that comes back takes it
        up again, both without moments, unless it was trained meanwhile. Otherwise it is gone. A kept prunable weight that is
        exactly 0 leaves its mask: the stored bitmap, `sparsity` and the mask are then one; but where it `grows`, it is to be
        trained from there, without moments.
        """
        before, self.optimizer.masks = self.optimizer.masks, {}
        for master, shards in self._by_master.items():
            given = [(shard, mask) for shard, mask in zip(shards, (masks[index] for index in self._positions[master]))]
            if all(mask is None for _, mask in given):
                continue
            values = master.detach()
            keep = torch.zeros_like(values, dtype=torch.bool)  # padding is pruned: it must stay 0
            for shard, mask in given:
                part = shard.part(keep)
                part.copy_(mask) if mask is not None else part.fill_(True)
            latent = self.optimizer.latents.get(master)
            if latent is not None:
                full = values + latent  # exact: where one is not 0 the other is
                latent.copy_(full).masked_fill_(keep, 0)
                values.copy_(full)
            values.masked_fill_(~keep, 0)
            is_nonzero = values != 0
            for shard, mask in given if not grows else ():
                if mask is not None and shard.name in self.prunable_names:
                    shard.part(keep).logical_and_(shard.part(is_nonzero))
            if (grows or latent is not None) and master in before and master not in self.optimizer.trained:
                self.optimizer.forget_moments(master, keep != before[master].bool())
            self.optimizer.masks[master] = keep if self.device.type == "cuda" else keep.to(torch.float32)
        self.sync()

    @torch.no_grad()
    def settle_masks(self) -> None:
        """Masks stop moving; a kept prunable weight that training brought to exactly 0 leaves its mask. No weight changes."""
        self.optimizer.hold_masks()
        for shard in self.prunable_shards:
            mask = shard.of(self.optimizer.masks)
            assert mask is not None, "prunable weights always have a mask"
            mask.copy_(shard.values != 0)

    def masks(self) -> list[Tensor | None]:
        """The bool mask [n] of each of `shards`; None where its whole group has none."""
        parts = [shard.of(self.optimizer.masks) for shard in self.shards]
        return [None if part is None else part.bool() for part in parts]

    def keep_latents(self, gather: Gather | None, names: Collection[str] = ()) -> None:
        """Until the next `restart` masks may move, and what is pruned is kept behind the mask: as it was, while `gather` adds
        up in every step, for the groups that hold prunable weights, or trained on where there is none. 8 bytes a weight."""
        touched = {*self.prunable_names, *names}
        for master in {shard.master: None for shard in self.shards if shard.name in touched}:
            self.optimizer.latents[master] = torch.zeros_like(master)
            if gather is None:
                mask = self.optimizer.masks.get(master)
                self.optimizer.trained[master] = torch.ones_like(master) if mask is None else mask.clone()
        if gather is not None:
            self.watch(gather)

    def watch(self, gather: Gather) -> None:
        """From the next step on `gather` adds up, from 0, for the groups that hold prunable weights."""
        masters = {shard.master: None for shard in self.prunable_shards}
        self.optimizer.gather, self.optimizer.gathered = gather, {master: torch.zeros_like(master) for master in masters}

    @torch.no_grad()
    def gather(self, name: str) -> Tensor:
        """The whole fp32 master of one parameter, in its shape, on every rank."""
        return self._gather(name, lambda shard: shard.values, torch.float32)

    @torch.no_grad()
    def gather_mask(self, name: str) -> Tensor | None:
        """The whole bool mask of one parameter on every rank; None where nothing of it is pruned and nothing can be."""
        parts = {shard.name: shard.of(self.optimizer.masks) for shard in self.shards}
        is_masked = torch.tensor(int(parts.get(name) is not None), device=self.device)
        if not int(self.all_reduce(is_masked)):
            return None
        mask = self._gather(name, lambda shard: cast(Tensor, shard.of(self.optimizer.masks)), torch.uint8).bool()
        return None if name not in self.prunable_names and bool(mask.all()) else mask

    def _gather(self, name: str, part_of: Callable[[Shard], Tensor], dtype: torch.dtype) -> Tensor:
        whole = torch.zeros(torch.Size(self.shapes[name]).numel(), dtype=dtype, device=self.device)
        for shard in self.shards:
            if shard.name == name:
                whole[shard.start:shard.start + shard.values.numel()] = part_of(shard)
        return self.all_reduce(whole).view(self.shapes[name])

    @torch.no_grad()
    def nonzero_counts(self) -> dict[str, int]:
        """Non-zero weights of every parameter, over all ranks."""
        return self._counts(torch.count_nonzero(shard.values) for shard in self.shards)

    @torch.no_grad()
    def kept_counts(self) -> dict[str, int]:
        """Weights that the masks keep of every parameter, over all ranks; all of one without a mask."""
        masks = (shard.of(self.optimizer.masks) for shard in self.shards)
        return self._counts(shard.values.numel() if mask is None else torch.count_nonzero(mask)
                            for shard, mask in zip(self.shards, masks))

    def _counts(self, of_shards: Iterable[Tensor | int]) -> dict[str, int]:
        """Counts of each of `shards`, added up by parameter over all ranks."""
        counts = torch.zeros(len(self.parameters), dtype=torch.int64, device=self.device)
        for shard, count in zip(self.shards, of_shards):
            counts[shard.index] += count
        return dict(zip(self.parameters, self.all_reduce(counts).tolist()))

    # ---- training ----

    def save_checkpoint(self, folder: str, step: int) -> None:
        """Weights, moments and the number of steps done, each rank its own part."""
        self._layout.save_checkpoint(folder, step)

    def load_checkpoint(self, folder: str) -> int:
        """Back to what `save_checkpoint` wrote under the same masks; the number of steps done."""
        step = self._layout.load_checkpoint(folder)
        self.set_masks(self.masks())
        return step

    def restart(self, l1_lambda: float, distill_alpha: float = 0.0, temperature: float = 1.0,
                distill_hidden: float = 0.0, trainable: str = "all") -> None:
        """A fresh optimizer: no moments, step 0, nothing gathered, no latent values; the masks as they are. With an alpha above
        0 the steps to come also follow the dense model's logits (loss.Teacher), with a `distill_hidden` its states."""
        self._trainable = trainable
        self.optimizer.restart()
        self.optimizer.l1_lambda = l1_lambda
        alpha, tau, weight = torch.tensor((distill_alpha, temperature, distill_hidden), device=self.device)
        self._distillation = (alpha, tau, weight, distill_hidden > 0) if distill_alpha or distill_hidden else None
        if distill_hidden:  # transformers then hooks its blocks, in which a compiler would break the graph
            with torch.no_grad():
                self.model.eval()(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device), output_hidden_states=True)

    def train_step(self, tokens: Tensor, learning_rate: float, loss: Loss = next_token_loss, counted: Tensor | None = None
                   ) -> Tensor:
        """One optimizer step on this rank's `tokens` [sequences, context], `micro_sequences` at a time, whose gradients are
        added up in fp32; this rank's part of the loss, a mean over the ranks. `counted`: of all ranks' sequences, see loss."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate if self._trainable in ("all", group["name"]) else 0.0
        labels = None if counted is None else labels_of(tokens, counted, self.rank, self.micro_sequences)
        parts = self.there(tokens).split(self.micro_sequences)
        return self._layout.train_step([functools.partial(self._loss, part, loss, *given)
                                        for part, *given in (zip(parts, labels) if labels else zip(parts))])

    def there(self, tensor: Tensor) -> Tensor:
        """On the engine's device; copied while the step before computes."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def look(self, tokens: Tensor, gather: Gather) -> None:
        """What `gather` makes of the gradients of the cross-entropy on this rank's tokens, from 0; no weight changes."""
        self.watch(gather)
        distillation, self._distillation = self._distillation, None
        self.train_step(tokens, 0.0)
        self._distillation = distillation
        self.optimizer.forget_steps()

    def _loss(self, tokens: Tensor, loss: Loss, labels: Labels | None = None) -> Tensor:
        given = {} if labels is None else {"labels": tuple(map(self.there, labels))}
        if self._distillation is None:
            return self._layout.forward(input_ids=tokens, loss=loss, **given)
        alpha, temperature, weight, follows_states = self._distillation
        with torch.no_grad():
            dense = self._dense()(input_ids=tokens, use_cache=False, output_hidden_states=follows_states)
        states = {"states": (dense.hidden_states[1:], weight)} if follows_states else {}
        return self._layout.forward(input_ids=tokens, loss=loss, teacher=(dense.logits, alpha, temperature), **states, **given)

    def halve_micro_batch(self) -> int | None:
        """After memory ran out in a step: half as many sequences at a time from now on, or as divide the rank's; how many, and
        None where it was one."""
        if self.micro_sequences == 1:
            return None
        self.micro_sequences = next(n for n in range(self.micro_sequences // 2, 0, -1) if self.sequences_per_rank % n == 0)
        for parameter in self.model.parameters():
            parameter.grad = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.micro_sequences
