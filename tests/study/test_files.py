"""Files that appear whole or not at all."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import refusing

from raysearch.cluster.doctor import check_store
from raysearch.study.files import new_directory, persist, write_json
from raysearch.study.storage import StorePath


def test_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    with pytest.raises(RuntimeError, match="boom"), new_directory(tmp_path / "round") as folder:
        (folder / "weights").write_text("x")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("soon")
def test_a_refused_record_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with refusing(), pytest.raises(OSError, match="a.json: cannot be written"):
        persist(path, lambda: write_json(path, {"a": "1" * 30_000}))
    assert path.read_text() == '{\n "a": 1\n}'
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_is_tried_again_once(store: StorePath, refusing_store: Callable[[float], None]) -> None:
    write_json(store / "a.json", {"a": 1})
    refusing_store(0.25)
    persist(store / "a.json", lambda: write_json(store / "a.json", {"a": 2}))
    refusing_store(60)
    with pytest.raises(OSError, match=r"x/a.json\?endpoint_override=.*: cannot be written, twice 0.5 s apart"):
        persist(store / "a.json", lambda: write_json(store / "a.json", {"a": 3}))
    refusing_store(0)
    time.sleep(0.2)
    assert json.loads((store / "a.json").read_text()) == {"a": 2}
    assert check_store(store).level == "ok"
    assert [path.name for path in store.iterdir()] == ["a.json"]
