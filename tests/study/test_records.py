"""Keys that name rounds."""

from raysearch.config import Action
from raysearch.study.records import round_key


def test_keys_follow_parent_and_action() -> None:
    action = Action(sparsity=0.5)
    assert round_key("a", action) == round_key("a", Action(sparsity=0.5, l1_lambda=0.0))
    assert len({round_key("a", action), round_key("b", action), round_key("a", Action(sparsity=0.51))}) == 3
