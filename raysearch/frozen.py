"""Frozen data, checked once at the border: the base of settings and records, and how their errors read."""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Frozen(BaseModel):
    """Base of every settings and record class: unknown fields, wrong types and later changes are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


FrozenT = TypeVar("FrozenT", bound=Frozen)


def _field(cls: type[Frozen], location: Sequence[object]) -> tuple[type[Frozen], list[str]]:
    """(the class that the innermost field belongs to, the path of fields) of pydantic's location of an error, which goes on
    inside the field: names of a union's alternatives, indices of a tuple."""
    section, path = cls, []
    for part in location:
        field = section.model_fields.get(str(part))
        if field is None:
            break
        path.append(str(part))
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Frozen)):
            break
        section = field.annotation
    return section, path


def parse(cls: type[FrozenT], data: dict[str, Any], where: str) -> FrozenT:
    """`cls(**data)`, or a ValueError of one sentence that names `where`, the field, the rule and the value."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first, *others = error.errors()
        section, path = _field(cls, first["loc"])
        field = ".".join(path or map(str, first["loc"]))
        rule = first["msg"].removeprefix("Value error, ")
        alternatives = [other["msg"] for other in others if path and _field(cls, other["loc"])[1] == path]  # of a union
        rule = " or ".join([rule, *alternatives])
        if first["type"] == "extra_forbidden":
            field, rule = ".".join(map(str, first["loc"])), f"no such field; the fields are {', '.join(section.model_fields)}"
        given = f" (got {first['input']!r})" if field else ""
        raise ValueError(f"{where}: {f'{field}: ' if field else ''}{rule}{given}") from error
