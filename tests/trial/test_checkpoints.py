"""When a long round is checkpointed."""

import pytest

from raysearch.trial import checkpoints
from raysearch.trial.checkpoints import Checkpoints
from raysearch.trial.worker import Worker


@pytest.mark.parametrize(("every_s", "wanted"), [(0.0, [50, 100, 150]), (20.0, [100]), (1e9, [])])
def test_it_is_rank_0s_clock_that_says_when_and_never_in_the_last_tenth(
        every_s: float, wanted: list[int], worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    now, saved, heard = [0.0], [], []
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    done, after_step = Checkpoints("key", every_s, lambda _, step: saved.append(step), lambda _: 20).resume(
        worker.engine, 210, heard.append)
    assert done == 20
    for step in range(21, 211):
        now[0] += 0.3
        after_step(step)
    assert saved == wanted
    assert heard == list(range(21, 211))
