"""The presets' sizes are the promised ones."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from raysearch.training.presets import PRESETS


@pytest.mark.parametrize(
    ("preset", "num_parameters"),
    [("books-30m", 29_676_544), ("gpt2-small", 124_439_808), ("gpt-efficio-950m", 949_792_896)],
)
def test_presets_have_the_promised_size(preset: str, num_parameters: int) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(PRESETS[preset].config())
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_every_preset_can_be_cut_into_sequences_and_heads() -> None:
    for preset in PRESETS.values():
        assert preset.batch_tokens % preset.context_tokens == 0
        assert preset.width % preset.num_heads == 0
    assert "ours" in PRESETS["gpt-efficio-950m"].note
