"""What every section of a configuration, and every record of a manifest, is."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from pydantic import BaseModel, ConfigDict, ValidationError

from esolm_megatron.errors import shown


class Section(BaseModel):
    """A frozen group of fields that refuses names it does not know, and numbers that are not finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def field_problems(error: ValidationError, hint: Callable[[tuple[str, ...]], str]) -> list[str]:
    """A line for each bad field: dotted path, value, and what is wrong; of an unknown one also the `hint` for its path."""
    out = []
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"])
        said = f"{'.'.join(path)} = {shown(item['input'])}"
        if item["type"] == "missing":
            out.append(f"{'.'.join(path)}: missing; give it a value")
        elif item["type"] == "extra_forbidden":
            out.append(f"{said}: no such field; {hint(path)}")
        else:
            out.append(f"{said}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return out


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
