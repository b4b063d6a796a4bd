"""What all commands share."""

import re
import sys
import threading
import time

import pytest

from raysearch import terminal


def test_a_command_is_never_silent_for_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "SILENT_S", 0.2)
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    ended = threading.Event()
    thread = threading.Thread(target=terminal.keep_talking, args=(ended,))
    thread.start()
    terminal.doing("at the sweep")
    time.sleep(1.5)
    ended.set()
    thread.join()
    terminal.now.clear()
    assert re.match(r"\[ +\d s\] still at the sweep\n", capsys.readouterr().out)
