"""What is printed for people: rich, which takes nothing for its own markup that users, files or other programs have named."""

from __future__ import annotations

from typing import Any

from rich.console import Console


class Terminal(Console):
    """rich's console, for which `[x]` is text."""

    def __init__(self, **options: Any):
        """The options of rich's console."""
        super().__init__(markup=False, **options)
