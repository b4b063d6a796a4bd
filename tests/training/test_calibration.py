"""What flows into the layers of a block, against whole forward passes of the model as it is by then, for every family of the
table; what cannot be reached is refused."""

import pytest
import torch
from families import CASES, STRANGERS, VOCAB, random_model

from raysearch.models.architectures import architecture
from raysearch.models.model import prunable_parameters
from raysearch.pruning.criteria import squares
from raysearch.training.calibration import stream

TOKENS = torch.arange(3 * 16).view(3, 16) * 7 % VOCAB


@pytest.mark.parametrize("family", CASES)
def test_a_block_sees_what_the_pruned_blocks_before_it_give(family: str) -> None:
    """By hand: a hook on one layer, and the whole model again for each; every block loses weights once it was looked at."""
    model, twin = random_model(CASES[family]()), random_model(CASES[family]())
    names = [p.name for p in prunable_parameters(model, "matrices")]
    parameters, others = dict(model.named_parameters()), dict(twin.named_parameters())
    seen: list[str] = []
    for sums in stream(model, TOKENS, [True, True, False], names, squares):
        for name, total in sums.items():
            inputs: list[torch.Tensor] = []
            hook = twin.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda module, given, inputs=inputs: inputs.append(given[0]))
            twin(input_ids=TOKENS[:2], use_cache=False)
            hook.remove()
            wanted = inputs[0].detach().flatten(0, -2).double().square().sum(0)
            assert torch.allclose(total, wanted, rtol=1e-4), name
        for name in sums:
            for owner in (parameters, others):
                with torch.no_grad():
                    owner[name].flatten()[::2] = 0
        seen += sums
    assert sorted(seen) == sorted(names)
    assert torch.equal(model(input_ids=TOKENS).logits, twin(input_ids=TOKENS).logits)


def test_what_it_cannot_reach_is_refused() -> None:
    model = random_model(CASES["gpt2"]())
    with pytest.raises(ValueError, match="needs weights of linear layers inside the blocks, got transformer.wte.weight"):
        next(stream(model, TOKENS, [True] * 3, ["transformer.wte.weight"], squares))
    family, config = next(iter(STRANGERS.items()))
    stranger = random_model(config())
    assert architecture(stranger) is None
    with pytest.raises(ValueError, match=f"block by block, and those of {family} are not known"):
        next(stream(stranger, TOKENS, [True] * 3, [], squares))
