"""The collector is off inside, and afterwards as it was, also behind an error and within another block."""

import gc

import pytest

from raysearch.study.collector import without_collector


@pytest.mark.parametrize("was_enabled", [True, False])
def test_it_is_as_it_was(was_enabled: bool) -> None:
    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), without_collector():
            with without_collector():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
