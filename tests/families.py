"""Configurations of tiny models of many families: those of the table of architectures, and others."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCAB, WIDTH, HEADS, UNITS = 257, 32, 4, 128
WIDE = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
OLD = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "bos_token_id": 0,
       "eos_token_id": 0}
GROUPED = {**WIDE, "intermediate_size": UNITS, "num_key_value_heads": 2}
KNOWN: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2Config(**OLD),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_layers=2, num_heads=HEADS, max_position_embeddings=64, intermediate_size=UNITS,
        attention_types=[[["global", "local"], 1]], window_size=8, bos_token_id=0, eos_token_id=0),
    "gptj": lambda: hf.GPTJConfig(**OLD, rotary_dim=4),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**WIDE, intermediate_size=UNITS, rotary_pct=0.5),
    "opt": lambda: hf.OPTConfig(**WIDE, ffn_dim=UNITS, word_embed_proj_dim=WIDTH),
    "xglm": lambda: hf.XGLMConfig(vocab_size=VOCAB, d_model=WIDTH, ffn_dim=UNITS, num_layers=2, attention_heads=HEADS,
                                  max_position_embeddings=64),
    "phi": lambda: hf.PhiConfig(**WIDE, intermediate_size=UNITS),
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "gemma": lambda: hf.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**GROUPED, head_dim=8),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=8),
    "stablelm": lambda: hf.StableLmConfig(**GROUPED),
    "cohere": lambda: hf.CohereConfig(**GROUPED),
    "granite": lambda: hf.GraniteConfig(**GROUPED),
    "olmo": lambda: hf.OlmoConfig(**GROUPED),
    "starcoder2": lambda: hf.Starcoder2Config(**GROUPED),
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=HEADS),
    "falcon": lambda: hf.FalconConfig(**WIDE),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**OLD),
}
VARIANTS = {
    "falcon 40b": lambda: hf.FalconConfig(**WIDE, new_decoder_architecture=True, num_kv_heads=2),
    "falcon 40b with slopes": lambda: hf.FalconConfig(**WIDE, new_decoder_architecture=True, num_kv_heads=2, alibi=True),
    "falcon with slopes": lambda: hf.FalconConfig(**WIDE, alibi=True, multi_query=False),
    "falcon of one query a head": lambda: hf.FalconConfig(**WIDE, multi_query=False, bias=True),
    "gpt_bigcode of one query a head": lambda: hf.GPTBigCodeConfig(**OLD, multi_query=False),
    "phi with norms of queries": lambda: hf.PhiConfig(**WIDE, intermediate_size=UNITS, qk_layernorm=True),
    "stablelm with norms of queries": lambda: hf.StableLmConfig(**GROUPED, qk_layernorm=True),
    "cohere with norms of queries": lambda: hf.CohereConfig(**GROUPED, use_qk_norm=True),
    "cohere with norms and one key-value head": lambda: hf.CohereConfig(
        **{**GROUPED, "num_key_value_heads": 1}, use_qk_norm=True),
    "olmo with clipped queries": lambda: hf.OlmoConfig(**GROUPED, clip_qkv=0.5),
    "gemma with one key-value head": lambda: hf.GemmaConfig(**{**GROUPED, "num_key_value_heads": 1}, head_dim=8),
}
CASES = KNOWN | VARIANTS
TWO_HEADS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "stablelm", "cohere", "granite", "olmo",
             "starcoder2", "falcon 40b", "falcon 40b with slopes", "stablelm with norms of queries",
             "cohere with norms of queries", "olmo with clipped queries"}
"""Two key-value heads, each with two queries."""
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
LATENT = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
          "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
STRANGERS: dict[str, Callable[[], Any]] = {
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "mamba": lambda: hf.MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, state_size=8),
    "mpt": lambda: hf.MptConfig(vocab_size=VOCAB, d_model=WIDTH, n_layers=2, n_heads=HEADS, max_seq_len=64),
    "mixtral": lambda: hf.MixtralConfig(**EXPERTS, num_local_experts=4),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**EXPERTS, num_experts=4),
    "gpt_oss": lambda: hf.GptOssConfig(**EXPERTS, num_local_experts=4, head_dim=8),
    "phimoe": lambda: hf.PhimoeConfig(**EXPERTS, num_local_experts=4),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**{**EXPERTS, "num_key_value_heads": HEADS}, **LATENT),
    "phi3": lambda: hf.Phi3Config(**GROUPED),
    "codegen": lambda: hf.CodeGenConfig(**OLD, n_ctx=64, rotary_dim=4),
    "rwkv": lambda: hf.RwkvConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, context_length=64),
}


def random_model(config: Any) -> Any:
    """fp32, with weights and biases large enough that nothing is lost by chance."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.2)
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():  # learned, as the biases of DeepSeek's experts
            torch.nn.init.normal_(buffer, 0.0, 0.5)
    return model
