"""What went wrong and was foreseen. Next to nothing is imported here, so that processes which only work start at once."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Something foreseen went wrong; its text says what, where, and how to mend it."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run. Its text has one line for each problem."""


class DataError(UserError, RuntimeError):
    """Prepared data that cannot be used."""


@contextmanager
def of_setting(name: str, value: object) -> Iterator[None]:
    """What goes wrong inside is said to come from the setting `name`; what the system refuses is a ConfigError then."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{name} = {shown(value)}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{name} = {shown(value)}: {error.strerror or error}") from error


MOST_SHOWN = 200
"""Characters of a value that a message repeats."""


def shown(value: object) -> str:
    """`value` as a message repeats it: without passwords, and not all of a long one."""
    text = without_secrets(repr(value))
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(text):,} characters)"


_USER = re.compile(r"(\w+://)(?:[^/\s'\"]*|[^/\s'\":@]+:(?!\d+/)[^\s'\"]*)@")
_QUERY = re.compile(r"((?:^|(?<=['\"]))(?!hf://)\w+://[^?'\"\n]*)\?[^'\"\n]*|(\b(?!hf://)\w+://[^?\s'\"]*)\?[^\s'\"]*")
_GIVEN = re.compile(
    r"((?:\s-u|--(?:proxy-)?user)[\s=]*|(?:proxy-)?authorization:\s*|[\w-]*(?:secret|token|passw(?:or)?d|passwd|api-?_?key|"
    r"access_?key)[\w-]*\s*[=:]\s*|--(?:token|password)\s+)(?:'[^']*'|\"[^\"]*\"|(?:(?:basic|bearer|token)\s+)?[^\s'\"]+)",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """`text`, an address or what quotes some, without their users, passwords and queries, which often are signatures.

    Of commands also without what the usual options, headers and variables for keys are given.
    """
    text = _QUERY.sub(lambda found: f"{found[1] or found[2]}?...", _USER.sub(r"\1", text))
    return _GIVEN.sub(r"\1...", text) if "pipe:" in text else text


EXTRAS = {
    "train": ("deepspeed", "megatron", "wandb"),
    "fp8": ("torchao",),
    "data": ("datasets", "matplotlib", "pyarrow", "zstandard"),
    "hf": ("transformers",),
    "eval": ("lm_eval",),
    "mauve": ("mauve",),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "s3": ("s3fs",),
    "slurm": ("submitit",),
}
"""Extra -> what is imported of it; where several bring a package, the one to name (pyproject.toml)."""


def missing_package(error: ImportError) -> ConfigError | None:
    """What to tell a user who lacks the extra that a failed import needs; None where no extra of ours brings it."""
    name = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if isinstance(error, ModuleNotFoundError) and name in packages:
            return ConfigError(f"needs the package {name}; pip install 'esolm-megatron[{extra}]'")
    return None


def optional(name: str, wanted_by: str) -> Any:
    """The module `name` of an extra.

    Raises:
        ConfigError: it is not installed; says what wanted it, and the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        raise ConfigError(f"{wanted_by}: {missing}") from None


def require(names: Iterable[str], wanted_by: str) -> None:
    """Say at once, without importing them, that packages of an extra are missing.

    Raises:
        ConfigError: as `optional`.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{wanted_by}: {missing_package(ModuleNotFoundError(name=name))}")
