"""`raysearch generate`: what a deployed model writes."""

import torch

from raysearch.deploy.load import open_model
from raysearch.models.model import context_limit, load_tokenizer


@torch.no_grad()
def generate(folder: str, prompt: str, max_new_tokens: int = 50, chat: bool = False) -> str:
    """The prompt's continuation, by the folder's generation settings. ValueError for an empty prompt, one that leaves no room
    in the context, or a chat without a template."""
    model, tokenizer = open_model(folder), load_tokenizer(folder)
    if chat and not tokenizer.chat_template:
        raise ValueError(f"{folder}: its tokenizer has no chat template; leave --chat out")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        tokens = tokenizer(prompt, return_tensors="pt")
    num_tokens, limit = tokens["input_ids"].shape[1], context_limit(model.config)
    if not num_tokens or num_tokens + max_new_tokens > limit:
        raise ValueError(f"a prompt and what follows must be 1 to {limit} tokens, got {num_tokens} and {max_new_tokens} new "
                         "ones; change the prompt or --max-new-tokens")
    made = model.generate(**tokens.to(model.device), max_new_tokens=max_new_tokens,
                          pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
    return str(tokenizer.decode(made[0, num_tokens:], skip_special_tokens=True))
