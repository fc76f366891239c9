"""What went wrong and was foreseen. Nothing is imported here, so that processes which only work start at once."""

from __future__ import annotations


class UserError(Exception):
    """Something foreseen went wrong; its text says what, where, and how to mend it."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run. Its text has one line for each problem."""


class DataError(UserError, RuntimeError):
    """Prepared data that cannot be used."""
