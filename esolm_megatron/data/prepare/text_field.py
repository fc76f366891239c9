"""Where the text of a record is: a field, one inside others (`content.text`), or several that are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BETWEEN = "\n"
"""Between the texts of several fields."""


class NoText(ValueError):
    """Why a record has no text."""


@dataclass(frozen=True)
class TextField:
    """The fields whose texts are a document; of several, those that are null or missing are passed over."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, said: str | Sequence[str]) -> TextField:
        """As configurations say it: a name, or a list of names."""
        return cls((said,) if isinstance(said, str) else tuple(said))

    def __str__(self) -> str:
        return repr(self.names[0]) if len(self.names) == 1 else f"[{', '.join(self.names)}]"

    def text(self, record: Any) -> str:
        """The text of a record.

        Raises:
            NoText: it has none; says which field is missing, null, or of another type.
        """
        if len(self.names) == 1 and isinstance(record, dict) and type(text := record.get(self.names[0])) is str:
            return text  # nearly always
        if not isinstance(record, dict):
            raise NoText(f"no JSON object, but a {type(record).__name__}")
        found = [_value(record, name) for name in self.names]
        texts = [value for value in found if isinstance(value, str)]
        for name, value in zip(self.names, found, strict=True):
            if value is MISSING and not texts:
                raise NoText(f"no field {name!r}")
            if value is None and not texts:
                raise NoText(f"field {name!r} is null")
            if value is not MISSING and value is not None and not isinstance(value, str):
                raise NoText(f"field {name!r} is no text, but a {type(value).__name__}")
        return texts[0] if len(texts) == 1 else BETWEEN.join(texts)


MISSING = object()


def _value(record: dict[str, Any], name: str) -> Any:
    """What stands under a name; one with dots leads into records, unless a field has it as it is."""
    if name in record:
        return record[name]
    node: Any = record
    for part in name.split("."):
        if not isinstance(node, dict) or part not in node:
            return MISSING
        node = node[part]
    return node
