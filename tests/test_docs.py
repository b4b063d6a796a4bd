"""Documents that name parts of the code name parts that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_fault_has_its_row_and_every_named_test_exists() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if re.match(r"\| \d", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 26))
    defined = {name for path in (ROOT / "tests").rglob("test_*.py")
               for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    for row in rows:
        named = set(re.findall(r"`(test_\w+)`", row))
        assert named <= defined, named - defined
        assert named or "does not exist here" in row, row
