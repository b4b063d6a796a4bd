"""The smallest gang that holds a model: ranks per trial and ZeRO stage from bytes, before anything is allocated.

Bytes of one rank of n, for P parameters of b bytes each (Rajbhandari et al. 2020, section 3, the mask and what DeepSpeed
0.19.8 allocates besides added):

    weights            b P        stage 3: b P / n, and what is gathered at a time
    gradients          b P        stages 2 and 3: / n
    fp32 master        4 P        stages 1 to 3: / n; none at stage 0 in fp32, where the weights are the masters
    Adam moments       8 P        stages 1 to 3: / n
    mask               P          stages 1 to 3: / n (an upper bound: only prunable weights have one)
    and the larger of
      activations and logits      of the rank's share of the batch, during the backward pass
      fp32 gradients     4 P      during the optimizer's step; as the master; none at stage 0 in fp32
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from raysearch.config import Study
from raysearch.models.model import ModelSize

GATHERED_PARAMETERS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters and its sub_group_size, both left at their defaults."""
ACTIVATION_BYTES = 34
"""Per hidden unit, token and layer with 16-bit activations (Korthikanti et al. 2022, eq. 2), without the term of the
attention matrix, which flash attention never stores; twice as much in fp32."""
LOGIT_BYTES = 12
"""Per token and vocabulary entry: logits, their fp32 copy, and the gradients of both."""
USABLE = 0.92
"""Of a GPU's memory; the rest is for the CUDA context, NCCL's buffers and fragmentation."""
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Placement:
    num_ranks: int
    zero_stage: Literal[0, 1, 2, 3]
    arithmetic: str
    """Plain lines: why this one, and why none that is smaller."""


def rank_bytes(size: ModelSize, *, num_ranks: int, zero_stage: int, dtype: str, rank_tokens: int) -> dict[str, float]:
    """Bytes of one rank by purpose, at the moment when they are most."""
    itemsize = ITEMSIZE[dtype]
    total, share = size.num_parameters, size.num_parameters / num_ranks
    optimizer = share if zero_stage else total
    has_master = zero_stage > 0 or dtype != "float32"
    always = {
        "weights": itemsize * (share if zero_stage == 3 else total),
        "gathered weights": itemsize * min(total, GATHERED_PARAMETERS) if zero_stage == 3 else 0,
        "gradients": itemsize * (share if zero_stage >= 2 else total),
        "fp32 master": 4 * optimizer * has_master,
        "Adam moments": 8 * optimizer,
        "mask": optimizer,
    }
    activations = ACTIVATION_BYTES * itemsize / 2 * size.hidden_size * size.num_layers * rank_tokens
    logits = LOGIT_BYTES * size.vocab_size * rank_tokens
    step = 4 * (min(share, GATHERED_PARAMETERS) if zero_stage == 3 else optimizer) * has_master
    passing = {"fp32 gradients of the step": step} if step > activations + logits else {
        "activations": activations, "logits": logits}
    return {purpose: float(num_bytes) for purpose, num_bytes in {**always, **passing}.items() if num_bytes}


def place(study: Study, size: ModelSize, gpu_bytes: int, num_gpus: int) -> Placement:
    """The first of 1, 2, 4, 8, ... ranks that divide the batch, each with its lowest stage, that fits `num_gpus` GPUs of
    `gpu_bytes`; where `study` fixes one of the two it is kept. ValueError of one sentence when none fits."""
    budget = USABLE * gpu_bytes * min(1.0, study.cluster.gpus_per_rank)
    refused: list[str] = []
    for num_ranks, stage in _choices(study, num_gpus):
        need = rank_bytes(size, num_ranks=num_ranks, zero_stage=stage, dtype=study.model.dtype,
                          rank_tokens=study.training.batch_tokens // num_ranks)
        what = f"{num_ranks} rank{'s' * (num_ranks > 1)} at ZeRO-{stage}"
        if sum(need.values()) <= budget:
            terms = " + ".join(f"{purpose} {_gb(num_bytes)}" for purpose, num_bytes in need.items())
            lines = [f"{what}: {_gb(sum(need.values()))} of the {_gb(budget)} GB that each may use "
                     f"({USABLE:.0%} of {study.cluster.gpus_per_rank:g} GPU of {_gb(gpu_bytes)} GB)", f"  = {terms}",
                     f"  for {size.num_parameters / 1e6:,.1f} M parameters in {study.model.dtype} and "
                     f"{study.training.batch_tokens // num_ranks} tokens per rank; estimated, evaluation not counted"]
            lines += [f"  too large: {', '.join(refused)}"] if refused else []
            return Placement(num_ranks, stage, "\n".join(lines))
        refused.append(f"{what} {_gb(sum(need.values()))} GB")
    most = f"; {refused[-1]} of {_gb(budget)} GB usable" if refused else ""
    raise ValueError(f"num_ranks and zero_stage: nothing fits {num_gpus} GPUs of {_gb(gpu_bytes)} GB for "
                     f"{size.num_parameters / 1e6:,.0f} M parameters in {study.model.dtype}{most}; lower batch_tokens "
                     f"({study.training.batch_tokens}), or use more or larger GPUs")


def _choices(study: Study, num_gpus: int) -> Iterator[tuple[int, Literal[0, 1, 2, 3]]]:
    """(ranks, stage), cheapest first: sharding one rank saves nothing, and a whole copy per rank nothing either."""
    sizes = [2**k for k in range(num_gpus.bit_length())] if study.cluster.num_ranks == "auto" else [study.cluster.num_ranks]
    for num_ranks in sizes:
        too_many = num_ranks * study.cluster.gpus_per_rank > num_gpus or (num_ranks > 1 and study.cluster.gpus_per_rank < 1)
        if too_many or study.training.batch_tokens % (study.data.context_tokens * num_ranks):
            continue
        if study.cluster.zero_stage != "auto":
            yield num_ranks, study.cluster.zero_stage
        elif num_ranks == 1:
            yield 1, 0
        else:
            yield num_ranks, 1
            yield num_ranks, 2
            yield num_ranks, 3


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f}"
