"""The smallest gang that holds a model, and its largest micro-batch: from bytes, before anything is allocated.

Bytes of one rank of n, for P parameters of b bytes each (Rajbhandari et al. 2020, section 3, the mask and what DeepSpeed
0.19.8 allocates besides added):

    weights            b P        stage 3: b P / n, and what is gathered at a time
    gradients          4 P        stage 1: b P; stages 2 and 3: 4 P / n
    fp32 master        4 P        stages 1 to 3: / n; none at stage 0 in fp32, where the weights are the masters
    Adam moments       8 P        stages 1 to 3: / n
    mask               P          stages 1 to 3: / n (an upper bound: only prunable weights have one)
    teacher            b P        where a round distils; stage 3: b P / n
    beside the masters 4 to 24 P  of criteria that gather, or train what they pruned; stages 1 to 3: / n (an upper bound, too)
    and the largest of
      activations and logits      of a micro-batch, as the backward pass begins; a teacher's logits, all of them, and the hidden
                                  states behind its blocks, where those are followed
      other gradients             as it ends: b P at stage 0, unless in fp32; 4 P / n during the steps of stages 1 and 3
      calibration                 before training: the hidden states of its text twice, three matrices of K inputs x K in fp32
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raysearch.config import Action, Study
from raysearch.models.model import ModelSize
from raysearch.pruning.criteria import CRITERIA

GATHERED_PARAMETERS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters and its sub_group_size, both left at their defaults."""
ACTIVATION_BYTES = 34
"""Per hidden unit, token and layer with 16-bit activations (Korthikanti et al. 2022, eq. 2), without the term of the
attention matrix, which flash attention never stores; twice as much in fp32."""
LOGITS_AT_ONCE = 1 << 28
"""As many are held at once: 0.5 GB in bf16. Larger parts are no faster (4,096 positions of 50,257 logits against all 16,384:
402,400 and 403,300 tokens/s with a 124 M model, H200, 2026-11-27), smaller ones fill the GPU less."""
LOGIT_BYTES = {"float32": 16, "bfloat16": 4}
"""Of one: itself and its gradient; in fp32, which is not compiled, also what lies between."""
MOST_MICRO_TOKENS, MOST_MICRO_WORK = 65_536, 65_536 * 768
"""More tokens, or tokens times hidden size, are no faster. On an H200 (2026-11-27) 30 M parameters train at 1,278,000,
1,661,000 and 1,736,000 tokens/s with 16,384, 32,768 and 65,536 tokens at a time; 950 M at 77,069 with 16,384 and 77,361 with
65,536."""
USABLE = 0.92
"""Of a GPU's memory; the rest is for the CUDA context, NCCL's buffers and fragmentation."""
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Placement:
    num_ranks: int
    zero_stage: Literal[0, 1, 2, 3]
    arithmetic: str
    """Plain lines: why this one, and why none that is smaller."""


class MicroBatch(NamedTuple):
    """What one rank has in memory at a time."""

    tokens: int
    is_checkpointed: bool
    """Of each layer only its input is kept, and the rest is computed again in the backward pass (Chen et al. 2016)."""


class Work(NamedTuple):
    """What the trials of a study ask of a gang."""

    tokens: float = 0.0
    """That it trains on."""
    distils: bool = False
    """Whether a dense teacher is in memory while it trains."""
    follows_states: bool = False
    """Whether the teacher's hidden states are, too."""
    bytes_beside: int = 0
    """Of each weight, besides master, moments and mask."""
    calibration_tokens: int = 0
    """The most that one round looks at."""


def work_of(study: Study, trials: Sequence[Sequence[Action]]) -> Work:
    """By draws from the study's space."""
    actions = [action for trial in trials for action in trial]
    a_trial = sum(action.finetune_tokens for action in actions) / max(1, len(trials))
    return work_in_training(actions)._replace(
        tokens=a_trial * study.search.num_trials / study.search.max_concurrent,
        calibration_tokens=study.data.context_tokens * max((a.calibration_sequences for a in actions), default=0))


def work_in_training(actions: Sequence[Action]) -> Work:
    """What the dearest of these rounds has in memory while it trains."""
    return Work(distils=any(action.distill_alpha or action.distill_hidden for action in actions),
                follows_states=any(action.distill_hidden for action in actions),
                bytes_beside=max((max(CRITERIA[action.criterion].bytes_beside, 4 * bool(action.layer_drop))
                                  for action in actions), default=0))


def repays_compilation(size: ModelSize, tokens: float) -> bool:
    """Whether compilation costs less than it saves, by docs/results/training.md (H200, 2026-11-27): 10, 14 and 14 s for 30, 124
    and 950 M parameters, of which each saves 0.6, 3 and 10 microseconds a token (the last two against an older eager step)."""
    return 2e-14 * size.num_parameters * tokens > 14.0


def rank_bytes(size: ModelSize, *, num_ranks: int, zero_stage: int, dtype: str, micro_batch: MicroBatch,
               work: Work | None = None) -> dict[str, float]:
    """Bytes of one rank by purpose, at the moment when they are most."""
    work = work or Work()
    itemsize = ITEMSIZE[dtype]
    total, share = size.num_parameters, size.num_parameters / num_ranks
    optimizer = share if zero_stage else total
    always = {
        "weights": itemsize * (share if zero_stage == 3 else total),
        "gathered weights": itemsize * min(total, GATHERED_PARAMETERS) if zero_stage == 3 else 0,
        "gradients": {0: 4 * total, 1: itemsize * total}.get(zero_stage, 4 * share),
        "fp32 master": 4 * optimizer * (zero_stage > 0 or dtype != "float32"),
        "Adam moments": 8 * optimizer,
        "mask": optimizer,
        "teacher": itemsize * (share if zero_stage == 3 else total) * work.distils,
        "beside the masters": optimizer * work.bytes_beside,
    }
    layer = itemsize * size.hidden_size * micro_batch.tokens
    whole = ACTIVATION_BYTES / 2 * layer
    activations = size.num_layers * layer + whole if micro_batch.is_checkpointed else size.num_layers * whole
    logits = (LOGIT_BYTES[dtype] * min(size.vocab_size * micro_batch.tokens, LOGITS_AT_ONCE)
              + (4 + itemsize) * size.vocab_size * size.hidden_size  # and the head's gradient
              + itemsize * size.vocab_size * micro_batch.tokens * work.distils
              + size.num_layers * layer * work.follows_states)
    wide = 4 * size.hidden_size  # the inputs of the second matrix of an MLP
    calibration = (2 * itemsize * size.hidden_size * work.calibration_tokens / num_ranks
                   + 3 * 4 * wide**2) * (work.calibration_tokens > 0)
    late = {0: itemsize * total * (dtype != "float32"), 1: 4 * share, 2: 0.0,
            3: 4 * min(share, GATHERED_PARAMETERS)}[zero_stage]
    passing = max({"activations": activations, "logits": logits}, {"other gradients": late}, {"calibration": calibration},
                  key=lambda moment: sum(moment.values()))
    return {purpose: float(num_bytes) for purpose, num_bytes in {**always, **passing}.items() if num_bytes}


def host_bytes(size: ModelSize, zero_stage: int, dtype: str) -> float:
    """Of a rank on a GPU, besides its process: the model while it is loaded, which stage 3 partitions on the GPU at once, or
    two of its largest parameters in fp32, while a candidate is stored. The files are mapped, once for a node."""
    largest = size.hidden_size * max(size.vocab_size, 4 * size.hidden_size)
    return float(max(ITEMSIZE[dtype] * size.num_parameters * (zero_stage < 3), 2 * 4 * largest))


def largest_micro_batch(size: ModelSize, study: Study, num_ranks: int, zero_stage: int, budget: float,
                        work: Work | None = None) -> MicroBatch:
    """The largest that fits `budget` bytes, checkpointed only where a single sequence would not fit else; a checkpointed
    sequence where none fits."""
    context_tokens = study.data.context_tokens
    num_sequences = study.training.batch_tokens // num_ranks // context_tokens
    most = max(context_tokens, min(MOST_MICRO_TOKENS, MOST_MICRO_WORK // size.hidden_size))
    choices = [context_tokens * number for number in range(num_sequences, 0, -1)
               if num_sequences % number == 0 and context_tokens * number <= most]
    if study.cluster.micro_batch_tokens != "auto":
        choices = [study.cluster.micro_batch_tokens]
    for is_checkpointed in (False, True):
        for tokens in choices:
            found = MicroBatch(tokens, is_checkpointed)
            need = rank_bytes(size, num_ranks=num_ranks, zero_stage=zero_stage, dtype=study.model.dtype, micro_batch=found,
                              work=work)
            if sum(need.values()) <= budget:
                return found
    return MicroBatch(choices[-1], True)


def place(study: Study, size: ModelSize, gpu_bytes: int, num_gpus: int, host_bytes_per_gpu: float = math.inf,
          work: Work | None = None) -> Placement:
    """The first of 1, 2, 4, 8, ... ranks that divide the batch, each with its lowest stage, that fits `num_gpus` GPUs of
    `gpu_bytes` and the memory of their hosts; where `study` fixes one of the two it is kept. ValueError of one sentence when
    none fits."""
    budget = USABLE * gpu_bytes * min(1.0, study.cluster.gpus_per_rank)
    of_host = host_bytes_per_gpu * study.cluster.gpus_per_rank
    refused: list[str] = []
    for num_ranks, stage in _choices(study, num_gpus):
        micro_batch = largest_micro_batch(size, study, num_ranks, stage, budget, work)
        need = rank_bytes(size, num_ranks=num_ranks, zero_stage=stage, dtype=study.model.dtype, micro_batch=micro_batch,
                          work=work)
        what = f"{num_ranks} rank{'s' * (num_ranks > 1)} at ZeRO-{stage}"
        on_host = host_bytes(size, stage, study.model.dtype)
        if on_host > of_host:
            refused.append(f"{what} {_gb(on_host)} GB of the {_gb(of_host)} GB of its host's memory")
            continue
        if sum(need.values()) <= budget:
            terms = " + ".join(f"{purpose} {_gb(num_bytes)}" for purpose, num_bytes in need.items())
            lines = [f"{what}: {_gb(sum(need.values()))} of the {_gb(budget)} GB that each may use "
                     f"({USABLE:.0%} of {study.cluster.gpus_per_rank:g} GPU of {_gb(gpu_bytes)} GB)", f"  = {terms} GB",
                     f"  for {size.num_parameters / 1e6:,.1f} M parameters in {study.model.dtype}, "
                     f"{study.training.batch_tokens // num_ranks} tokens per rank and step, {micro_batch.tokens} at a time"
                     f"{' with checkpointed activations' * micro_batch.is_checkpointed}; estimated, evaluation not counted",
                     f"  and {_gb(on_host)} GB of its host's memory while it loads or stores the model"]
            lines += [f"  too large: {', '.join(refused)}"] if refused else []
            return Placement(num_ranks, stage, "\n".join(lines))
        refused.append(f"{what} {_gb(sum(need.values()))} GB of {_gb(budget)} GB usable")
    most = f"; {refused[-1]}" if refused else ""
    raise ValueError(f"num_ranks and zero_stage: nothing fits {num_gpus} GPUs of {_gb(gpu_bytes)} GB for "
                     f"{size.num_parameters / 1e6:,.0f} M parameters in {study.model.dtype}{most}; use more or larger GPUs, "
                     f"or a shorter context_tokens ({study.data.context_tokens})")


def _choices(study: Study, num_gpus: int) -> Iterator[tuple[int, Literal[0, 1, 2, 3]]]:
    """(ranks, stage), cheapest first: sharding one rank saves nothing, and a whole copy per rank nothing either."""
    sizes = [2**k for k in range(num_gpus.bit_length())] if study.cluster.num_ranks == "auto" else [study.cluster.num_ranks]
    for num_ranks in sizes:
        too_many = num_ranks * study.cluster.gpus_per_rank > num_gpus or (num_ranks > 1 and study.cluster.gpus_per_rank < 1)
        micro = study.cluster.micro_batch_tokens
        if too_many or study.training.batch_tokens % (num_ranks * (study.data.context_tokens if micro == "auto" else micro)):
            continue
        sharding: tuple[Literal[0, 1, 2, 3], ...] = (0,) if num_ranks == 1 else (1, 2, 3)
        for stage in sharding if study.cluster.zero_stage == "auto" else (study.cluster.zero_stage,):
            yield num_ranks, stage


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f}"
