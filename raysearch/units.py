"""Numbers with units, as people write and read them."""

import re
from decimal import Decimal


def human_bytes(num_bytes: float) -> str:
    """Powers of 1000: 512 B, 3.42 MB, 1.90 GB."""
    return _human(num_bytes, " GB", " MB", " kB", " B")


def human_count(count: float) -> str:
    """Powers of 1000: 512, 24.1M, 1.5B."""
    return _human(count, "B", "M", "k", "")


def _human(number: float, *units: str) -> str:
    for unit, divisor in zip(units, (1e9, 1e6, 1e3)):
        if number >= 0.9995 * divisor:
            return f"{number / divisor:.3g}{unit}"
    return f"{number:.0f}{units[-1]}"


_BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20,
               "GIB": 2**30, "TIB": 2**40}
_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_bytes(text: str) -> int:
    """"1.2GB", "300MB" (powers of 1000), "2GiB" (powers of 1024) or plain bytes, as bytes."""
    return _parse_quantity(text, _BYTE_UNITS, "a size must be a number of bytes such as 1200000, 300MB or 1.2GB")


def parse_count(text: str) -> int:
    """"24M", "1.5B", "300k" or a plain number of parameters."""
    return _parse_quantity(text, _COUNT_UNITS, "a count must be a number of parameters such as 24000000, 24M or 1.5B")


def _parse_quantity(text: str, units: dict[str, int], rule: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]\d{1,2})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in units or Decimal(match[1]) == 0:
        raise ValueError(f"{rule}, got {text!r}")
    return int(Decimal(match[1]) * units[match[2].upper()])


def parse_seconds(text: str) -> float:
    """ "90s", "10m", "2h" or a number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--time-budget must be a positive time such as 90s, 10m or 2h, got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
