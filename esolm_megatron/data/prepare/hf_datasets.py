"""Hugging Face datasets as inputs: hf://NAME?config=C&split=S&revision=R, NAME one of the hub's, or a local folder.

A dataset of the hub, or a folder of its files, is streamed: nothing is kept on the disk. A folder made by `save_to_disk`
is read in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from esolm_megatron.data.prepare.text_field import NoText, TextField
from esolm_megatron.errors import ConfigError, optional

SCHEME = "hf://"
_OPTIONS = ("config", "split", "revision")


def parse(address: str) -> tuple[str, dict[str, str]]:
    """Name and options of an address; split is "train" unless given.

    Raises:
        ConfigError: it has no name, or an option that is not known.
    """
    name, _, query = address.removeprefix(SCHEME).partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [option for option in given if option not in _OPTIONS]
    if unknown or not name:
        what = f"no option {unknown[0]!r}; known: {', '.join(_OPTIONS)}" if unknown else "a name is missing"
        raise ConfigError(f"{address}: {what}; write hf://NAME?config=C&split=S&revision=R")
    return name, {"split": "train", **given}


def pinned(address: str) -> str:
    """The address with the hub's present commit as its revision, so that every later reading gives the same rows.

    A local folder's address is returned as it is.

    Raises:
        ConfigError: the hub does not answer, or does not know it.
    """
    name, given = parse(address)
    if Path(name).exists():
        return address
    from huggingface_hub import HfApi

    try:
        sha = HfApi().dataset_info(name, revision=given.get("revision")).sha
    except Exception as error:  # the library's errors, and those of its transports
        raise _unreachable(address, error) from error
    return f"{SCHEME}{name}?" + "&".join(f"{key}={value}" for key, value in {**given, "revision": sha}.items())


def text_fields(address: str, field: TextField) -> tuple[bool, dict[str, bool]]:
    """Whether the dataset has the text, and for each of its fields, whether that holds text.

    Raises:
        ConfigError: it cannot be opened.
    """
    rows = _opened(address)
    if rows.features is None:
        try:
            first: dict[str, Any] = next(iter(rows), {})
        except Exception as error:
            raise _unreachable(address, error) from error
    else:
        first = _example(rows.features)
    fields = {name: isinstance(value, str) for name, value in first.items()}
    try:
        field.text(first)
    except NoText:
        return False, fields
    return True, fields


def _example(kind: Any) -> Any:
    """A value of a kind of feature: texts in the places of texts."""
    if isinstance(kind, dict):
        return {name: _example(inner) for name, inner in kind.items()}
    return "" if getattr(kind, "dtype", "") in ("string", "large_string") else 0


def cut(address: str, piece_bytes: int) -> list[tuple[int, int, int]]:
    """(start, stop, bytes) of the pieces: rows of a saved dataset, single shards of a streamed one.

    Bytes are 0 where nothing tells the size.

    Raises:
        ConfigError: it cannot be opened.
    """
    rows = _opened(address)
    if _saved(address):
        step = max(1, round(len(rows) * min(1.0, piece_bytes / max(rows.data.nbytes, 1))))
        each = rows.data.nbytes / max(len(rows), 1)
        bounds = ((start, min(start + step, len(rows))) for start in range(0, len(rows), step))
        return [(start, stop, round((stop - start) * each)) for start, stop in bounds]
    known = (rows.info.splits or {}).get(parse(address)[1]["split"])
    size = (known.num_bytes or 0) // rows.num_shards if known else 0
    return [(shard, shard + 1, size) for shard in range(rows.num_shards)]


def read(address: str, start: int, stop: int, field: TextField) -> Iterator[Any]:
    """Rows [start, stop) of a saved dataset, or those of shard `start` of a streamed one, with what `field` names.

    Raises:
        OSError: reading failed.
    """
    rows = _opened(address)
    names = (
        [name if name in rows.column_names else name.split(".")[0] for name in field.names] if _saved(address) else []
    )
    part = rows.select_columns(names).select(range(start, stop)) if names else rows.shard(rows.num_shards, start)
    try:
        yield from part
    except Exception as error:  # each builder has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


def _saved(address: str) -> bool:
    return (Path(parse(address)[0]) / "state.json").exists()


@lru_cache(maxsize=8)
def _opened(address: str) -> Any:
    name, given = parse(address)
    datasets = optional("datasets", address)
    if (Path(name) / "dataset_dict.json").exists():
        raise ConfigError(f"{address}: holds several saved datasets; name one: {SCHEME}{name}/{given['split']}")
    try:
        if _saved(address):
            return datasets.load_from_disk(name)
        return datasets.load_dataset(
            name, given.get("config"), split=given["split"], revision=given.get("revision"), streaming=True
        )
    except Exception as error:  # each builder has errors of its own
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()
    return ConfigError(
        f"{address}: cannot be opened: {type(error).__name__}: {reason[0] if reason else ''}; check name, config, split, "
        "revision and the network, or give a local folder"
    )
