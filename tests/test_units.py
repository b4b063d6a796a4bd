"""Numbers with units, as people write and read them."""

import pytest

from raysearch.units import parse_bytes, parse_count


@pytest.mark.parametrize(("text", "num_bytes"), [
    ("1200000", 1_200_000), ("1.2GB", 1_200_000_000), ("300 MB", 300_000_000), ("2GiB", 2 * 2**30), ("64kb", 64_000),
    ("1e6", 1_000_000), ("0.1GB", 100_000_000)])
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(("text", "count"), [("24M", 24_000_000), ("1.5B", 1_500_000_000), ("300k", 300_000)])
def test_parse_count(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "much", "-3MB", "0", "3 parsecs", "1.2.3GB", "nan", "inf", "1,2GB", "1e999"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a size must be a number of bytes such as 1200000, 300MB or 1.2GB, got '"):
        parse_bytes(text)
