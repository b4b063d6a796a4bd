"""The loss is a function that the module's forward takes, so that DeepSpeed's hooks and a compiled graph cover it.

Legend: B sequences, T tokens of each, N = B * T positions, D hidden size, V vocabulary. A teacher's temperature is tau.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from raysearch.cluster.placement import LOGITS_AT_ONCE
from raysearch.models.architectures import architecture

Head = Callable[..., Tensor]
"""head(hidden [..., D]) -> logits [..., V], with whatever bias, scale or cap the family has; head(hidden [N, D], targets [N])
-> the mean cross-entropy, with not all logits at once; with a teacher too, the mean loss by both."""
Teacher = tuple[Tensor, Tensor, Tensor]
"""(logits [B, T, V or more] of the dense model, alpha [], tau []): the loss is (1 - alpha) CE + alpha tau^2 KL(teacher ||
model), both of logits over tau (Hinton et al. 2015, arXiv 1503.02531, section 2). All are tensors, so that one graph serves
every trial."""
Loss = Callable[..., Tensor]
"""(hidden [B, T, D], head, tokens [B, T], and a teacher where there is one) -> a scalar, nats per token."""
Labels = tuple[Tensor, Tensor]
"""(tokens [B, T], IGNORED where they do not count; a weight [] of the loss on them, by how many count in the whole step)."""

States = tuple[tuple[Tensor, ...], Tensor]
"""(hidden states [B, T, D] of the dense model behind each block, the weight [] of `square_head` in the loss)."""

IGNORED = -100
"""The target of a position that does not count."""
CACHE_BYTES = 1 << 26
"""Free space that a cache must have, and that the code of a model does not take up."""
ABSENT = -1e30
"""A logit of no token: its probability is 0, and so is 0 times its logarithm, which that of -inf is not."""
ALIGNED = 64
"""Logits of a row, in a product on a GPU: 50,257 of them run on kernels two generations old."""
BLOCK_WORK = 1 << 24
"""Tokens times hidden size from which the blocks share a graph, instead of all being one: the GPU takes longer for a block
than the host for launching it. On an H200 (2026-11-27) that compiles in 7, 14 and 14 s instead of 18, 36 and 44 (30, 124,
950 M), and ran 9, 15 and 8 % faster; below, with 16,384 tokens of 30 M, it ran at 0.67 of one graph's rate."""


def labels_of(tokens: Tensor, counted: Tensor, rank: int, micro_sequences: int) -> list[Labels]:
    """Of each micro-batch of this rank's `tokens` [sequences, T]; `counted` bool [sequences of all ranks, T], both on the CPU,
    says which count in the step. The mean over micro-batches and ranks of the weighted means is then the mean over what
    counts, however a step is cut. Where nothing counts in a micro-batch everything does, with a weight of 0: no mean is 0 / 0.
    """
    per_micro = max(1, int(counted[:, 1:].sum())) * micro_sequences / len(counted)
    labels = []
    for part, counts in zip(tokens.split(micro_sequences), counted.split(len(tokens))[rank].split(micro_sequences)):
        num = int(counts[:, 1:].sum())
        labels.append((part.where(counts, IGNORED) if num else part, torch.tensor(num / per_micro)))
    return labels


def next_token_loss(hidden: Tensor, head: Head, tokens: Tensor, teacher: Teacher | None = None) -> Tensor:
    """Mean cross-entropy of each token but the first, mixed with the divergence from the teacher at the same positions."""
    targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    return head(hidden.flatten(0, 1), targets.flatten(), teacher)


def square_head(hidden: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The sum over the blocks of |hidden - teacher|^2 / |teacher|^2, Kurtic et al. 2023 (arXiv 2310.06927) eq. 2."""
    apart = [((found.float() - wanted.float()).square().mean(), wanted.float().square().mean())
             for found, wanted in zip(hidden, teacher, strict=True)]
    return torch.stack([error / (size + torch.finfo(torch.bfloat16).eps) for error, size in apart]).sum()


def _divergence(logits: Tensor, teacher: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """(tau^2 KL(teacher || model) [n], its gradient by the logits [n, V]) of logits fp32 [n, V], ABSENT in the same places."""
    wanted, found = ((each.float() - each.amax(-1, keepdim=True)) * (1 / temperature) for each in (teacher, logits))
    wanted, found = (each - each.exp().sum(-1, keepdim=True).log() for each in (wanted, found))
    return (wanted.exp() * (wanted - found)).sum(-1) * temperature**2, temperature * (found.exp() - wanted.exp())


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                         teacher: Teacher | None = None) -> Tensor:
    """Mean cross-entropy, mixed with the divergence from a teacher, fp32 [], of the logits hidden [N, D] @ weight [V, D]^T +
    bias [V] at the targets int64 [N] that are not IGNORED. Gradients are made in the forward pass, of a part of the positions
    after the other, so that no logits are kept or computed twice (Hsu et al. 2024, Liger Kernel, section 3.2; here the compiler
    fuses what lies between the products).
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, *(teacher or (None, None, None)))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, of_teacher: Tensor | None,
                alpha: Tensor, temperature: Tensor) -> Tensor:
        num_classes, dtype = weight.shape[0], hidden.dtype
        if hidden.is_cuda:
            weight = F.pad(weight, (0, 0, 0, -num_classes % ALIGNED))
        elif dtype != torch.float32:  # a CPU's products in bf16 may take 130 times as long
            hidden, weight = hidden.float(), weight.float()
        counts = targets != IGNORED
        num_counted = counts.sum()
        targets = targets.clamp(min=0)
        classes = torch.arange(weight.shape[0], device=weight.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        bias_grad = None if bias is None else torch.zeros(num_classes, dtype=torch.float32, device=weight.device)
        total = torch.zeros((), dtype=torch.float32, device=weight.device)
        size = max(1, LOGITS_AT_ONCE // weight.shape[0])
        columns = [hidden, hidden_grad, targets, counts, *([] if of_teacher is None else [of_teacher.flatten(0, -2)])]
        for x, x_grad, target, is_counted, *wanted in zip(*(t.split(size) for t in columns)):
            logits = (x @ weight.T).float()
            if bias is not None:
                logits = logits + F.pad(bias.float(), (0, weight.shape[0] - num_classes))
            if weight.shape[0] > num_classes:
                logits = logits.masked_fill(classes >= num_classes, ABSENT)
            log_sum = logits.logsumexp(-1)
            losses = log_sum - logits.gather(1, target[:, None])[:, 0]
            grad = (logits - log_sum[:, None]).exp() - (classes == target[:, None]).float()
            if wanted:  # as wide as the logits, so that the compiler reads both at once
                teacher = F.pad(wanted[0], (0, weight.shape[0] - wanted[0].shape[1])).float()
                apart, apart_grad = _divergence(logits, teacher.masked_fill(classes >= num_classes, ABSENT), temperature)
                losses = (1 - alpha) * losses + alpha * apart
                grad = (1 - alpha) * grad + alpha * apart_grad
            total = total + (losses * is_counted).sum()
            grad = grad * (is_counted / num_counted)[:, None]
            if bias_grad is not None:
                bias_grad += grad.sum(0)[:num_classes]
            grad = grad.to(x.dtype)
            x_grad.copy_(grad @ weight)
            weight_grad += grad.T @ x
        weight_grad = weight_grad[:num_classes].to(dtype)
        ctx.save_for_backward(hidden_grad.to(dtype), weight_grad, None if bias_grad is None else bias_grad.to(dtype))
        return total / num_counted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        return (hidden_grad * gradient.to(hidden_grad.dtype), weight_grad * gradient.to(weight_grad.dtype),
                None if bias_grad is None else bias_grad * gradient.to(bias_grad.dtype), None, None, None, None)


def take_loss(model: PreTrainedModel, compiled: bool = False, is_partitioned: bool = False, tokens: int = 0) -> None:
    """From now on the model's forward takes `loss`, and then returns loss(hidden, head, tokens), or that of `labels`; without
    it, what it always returned. Where the table of architectures does not say that the logits are head(base model), hidden are
    the logits.

    `compiled`: forward and loss are one graph; where the weights are partitioned (ZeRO-3), so that DeepSpeed gathers between
    graphs, and where `tokens`, those of a micro-batch, are work enough, the blocks share one, and the head has one.
    """
    if compiled:  # the cache's key holds the bodies of the function that _LinearCrossEntropy is: a changed one is a miss
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        _check_cache()
    forward = model.forward
    known = architecture(model)
    embeddings = model.get_output_embeddings()
    has_plain_head = known is not None and known.shares_prefixes and isinstance(embeddings, nn.Linear)
    blocks = () if known is None else model.get_submodule(known.blocks)
    by_block = is_partitioned or (has_plain_head and tokens * model.config.hidden_size >= BLOCK_WORK)
    graph: Callable[..., Any] = _compiled if compiled and not by_block else lambda function: function
    part: Callable[..., Any] = _compiled if compiled and by_block else lambda function: function
    if has_plain_head:
        logits_of, cross_entropy = embeddings.forward, part(linear_cross_entropy)

        def head(hidden: Tensor, targets: Tensor | None = None, teacher: Teacher | None = None) -> Tensor:
            if targets is None:
                return logits_of(hidden)
            return cross_entropy(hidden, embeddings.weight, embeddings.bias, targets, teacher)

        embeddings.forward = head
    for block in blocks if compiled and by_block else ():
        block.forward = _compiled_in_training(block)

    def loss_of(loss: Loss, tokens: Tensor, named: dict[str, Any], teacher: tuple[Teacher, ...], states: States | None,
                labels: Labels | None) -> Tensor:
        if states is not None:
            named = {**named, "output_hidden_states": True}
        wanted = tokens if labels is None else labels[0]
        if has_plain_head:
            output = model.base_model(tokens, **named, use_cache=False)
            value = loss(output.last_hidden_state, embeddings, wanted, *teacher)
        else:
            output = forward(tokens, **named)
            value = loss(output.logits, _cross_entropy_of_logits, wanted, *teacher)
        if labels is not None:
            value = value * labels[1]
        return value if states is None else value + states[1] * square_head(output.hidden_states[1:], states[0])

    loss_of = graph(loss_of)

    def with_loss(*inputs: Any, loss: Loss | None = None, teacher: Teacher | None = None, states: States | None = None,
                  **named: Any) -> Any:
        if loss is None:
            return forward(*inputs, **named)
        tokens, labels = named.pop("input_ids"), named.pop("labels", None)
        return loss_of(loss, tokens, named, () if teacher is None else (teacher,), states, labels)

    model.forward = with_loss


def as_teacher(model: PreTrainedModel, compiled: bool) -> PreTrainedModel:
    """The model, whose logits are wanted at every step and whose weights are whole and stay: compiled by block, its head and
    its logits padded to a width for which a GPU has fast products."""
    known, embeddings = architecture(model), model.get_output_embeddings()
    if not compiled or known is None or not isinstance(embeddings, nn.Linear):
        return model
    for block in model.get_submodule(known.blocks):
        block.forward = torch.compile(block.forward)
    padding = -embeddings.out_features % ALIGNED
    embeddings.weight = nn.Parameter(F.pad(embeddings.weight.detach(), (0, 0, 0, padding)), requires_grad=False)
    if embeddings.bias is not None:
        embeddings.bias = nn.Parameter(F.pad(embeddings.bias.detach(), (0, padding)), requires_grad=False)
    return model


def _check_cache() -> None:
    """What a compiler cannot write into its cache, it would raise in the middle of a step. Entries of another torch are under
    other keys, and damaged ones are compiled anew."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
    try:
        with tempfile.TemporaryFile(dir=cache_dir()) as file:
            os.posix_fallocate(file.fileno(), 0, CACHE_BYTES)
    except OSError as error:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="raysearch-compiled-")
        print(f"{folder}: compiled code cannot be kept there ({error.strerror}); set TORCHINDUCTOR_CACHE_DIR to a folder that "
              "the next gang finds", flush=True)


def _cross_entropy_of_logits(logits: Tensor, targets: Tensor | None = None, teacher: Teacher | None = None) -> Tensor:
    """The head of a model whose hidden states are its logits already."""
    if targets is None:
        return logits
    loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED)
    if teacher is None:
        return loss
    of_teacher, alpha, temperature = teacher
    apart, _ = _divergence(logits, of_teacher.flatten(0, -2)[:, :logits.shape[1]], temperature)
    return (1 - alpha) * loss + alpha * apart[targets != IGNORED].mean()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maxima and sums of softmaxes in loops of their own: with a teacher that takes 6.4 ms instead of 8.0 for 1.1 G logits, and
    without one as long (H200, 2026-11-27)."""
    return torch.compile(function, options={"online_softmax": False})


def _compiled_in_training(block: nn.Module) -> Callable[..., Any]:
    """Evaluation, whose shapes change, stays eager."""
    eager, compiled = block.forward, torch.compile(block.forward)
    return lambda *inputs, **named: (compiled if block.training else eager)(*inputs, **named)
