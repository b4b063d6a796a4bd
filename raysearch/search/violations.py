"""How far a candidate misses what the search is asked to keep."""

from raysearch.config import SearchSettings, is_maximised
from raysearch.study.records import RoundRecord, value_of


def violations(record: RoundRecord, dense: RoundRecord | None, search: SearchSettings) -> dict[str, float]:
    """By constraint, above 0 where it is missed, over the limit's size (of max_drop over the dense model's value): what
    Optuna wants to hear. Without those on a metric that the record, or of max_drop the dense baseline, does not have."""
    found = {}
    for name, limit in search.constraints.items():
        if (value := value_of(record, name)) is not None:
            found[name] = _sign(name) * (value - limit) / (abs(limit) or 1.0)
    for name, drop in search.max_drop.items():
        value, before = value_of(record, name), None if dense is None else value_of(dense, name)
        if value is not None and before is not None:
            lost = drop / 100 if is_maximised(name) else drop
            found[f"max_drop {name}"] = (_sign(name) * (value - before) - lost) / (abs(before) or 1.0)
    return found


def _sign(name: str) -> float:
    return -1.0 if is_maximised(name) else 1.0
