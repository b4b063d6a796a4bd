"""The loss is a function that the module's forward takes, so that DeepSpeed's hooks and a compiled graph cover it.

Legend: B sequences, T tokens of each, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from raysearch.models.architectures import architecture

Head = Callable[[Tensor], Tensor]
"""hidden [..., D] -> logits [..., V], with whatever bias, scale or cap the family has."""
Loss = Callable[[Tensor, Head, Tensor], Tensor]
"""(hidden [B, T, D], head, tokens [B, T]) -> a scalar, nats per token."""


def next_token_loss(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each token but the first, by transformers' own operations, on all logits at once."""
    logits = head(hidden)
    return ForCausalLMLoss(logits, tokens, vocab_size=logits.shape[-1])


def take_loss(model: PreTrainedModel) -> None:
    """From now on the model's forward takes `loss`, and then returns loss(hidden, head, tokens); without it, what it always
    returned. Where the table of architectures does not say that the logits are head(base model), hidden are the logits."""
    forward = model.forward
    known = architecture(model)
    has_plain_head = known is not None and known.shares_prefixes

    def with_loss(*inputs: Any, loss: Loss | None = None, **named: Any) -> Any:
        if loss is None:
            return forward(*inputs, **named)
        tokens = named["input_ids"]
        if not has_plain_head:
            return loss(forward(**named).logits, lambda logits: logits, tokens)
        hidden = model.base_model(**named, use_cache=False).last_hidden_state
        return loss(hidden, model.get_output_embeddings(), tokens)

    model.forward = with_loss
