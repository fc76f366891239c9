"""Names that a package hands on from its modules, imported when first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def hand_on(package: str, **names: str) -> Callable[[str], Any]:
    """A package's `__getattr__`: `names` has, for each module, the names that come from it.

    What starts often or must answer at once (the workers of prepare, `esolm --help`, planning) imports one module of a
    package, and must not import the others with it.
    """
    homes = {name: module for module, some in names.items() for name in some.split()}

    def getattr_(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return getattr_
