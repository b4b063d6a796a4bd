"""Shapes of dense GPT-2s and how to train them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GPT2Config


@dataclass(frozen=True)
class Preset:
    """A GPT-2 shape and how to train it."""

    num_layers: int
    width: int
    num_heads: int
    context_tokens: int
    vocab_size: int
    batch_tokens: int
    """Tokens of one optimizer step over all ranks."""
    num_steps: int
    learning_rate: float
    """Peak, after a linear warm-up and before a half cosine down to a tenth."""
    weight_decay: float
    note: str

    def config(self) -> "GPT2Config":
        from transformers import GPT2Config  # here, so that a mistyped preset is told at once

        return GPT2Config(vocab_size=self.vocab_size, n_positions=self.context_tokens, n_embd=self.width,
                          n_layer=self.num_layers, n_head=self.num_heads, resid_pdrop=0.0, embd_pdrop=0.0,
                          attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)


PRESETS = {
    "tiny": Preset(num_layers=2, width=128, num_heads=4, context_tokens=128, vocab_size=2048, batch_tokens=512,
                   num_steps=650, learning_rate=3e-3, weight_decay=0.1,
                   note="the demo's model: a minute on two cores"),
    "books-30m": Preset(num_layers=8, width=512, num_heads=8, context_tokens=512, vocab_size=8192, batch_tokens=65_536,
                        num_steps=9216, learning_rate=2e-3, weight_decay=0.1,
                        note="29.7 M parameters; 604 M tokens, 400 s on one H200"),
    "gpt2-small": Preset(num_layers=12, width=768, num_heads=12, context_tokens=1024, vocab_size=50_257,
                         batch_tokens=524_288, num_steps=20_000, learning_rate=6e-4, weight_decay=0.1,
                         note="GPT-2's smallest shape, 124.4 M parameters; 10 G tokens and the batch are ours"),
    "gpt-efficio-950m": Preset(num_layers=26, width=1664, num_heads=26, context_tokens=1024, vocab_size=50_257,
                               batch_tokens=524_288, num_steps=40_000, learning_rate=2.5e-4, weight_decay=0.1,
                               note="949.8 M parameters; the paper gives only 950 M: layers, width, heads, context, "
                                    "vocabulary and training are ours"),
}
