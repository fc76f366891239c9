"""Safetensors files written tensor by tensor, hashed on the way, and on the disk when the call returns."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PIECE_BYTES = 8 << 20  # small enough for the hash to find in cache what was just written

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class FileFacts:
    """What a file must still be when it is read again."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One tensor of a file that is yet to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> FileFacts:
    """Size and hash of the safetensors file at `path`, which holds one more tensor in memory only while it is written.

    `tensors` come in the order of `entries`, which is from wide to narrow dtypes: readers need aligned data.

    Raises:
        ValueError: the entries are not in that order, a name comes twice, or a tensor is not what its entry says.
    """
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"{path.name}: tensor {max(names, key=names.count)} comes more than once")
    widths = [entry.dtype.itemsize for entry in entries]
    if widths != sorted(widths, reverse=True):
        raise ValueError(f"{path.name}: entries must be ordered from wide to narrow dtypes")
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> None:
            for start in range(0, len(data), _PIECE_BYTES):
                part = data[start : start + _PIECE_BYTES]
                file.write(part)
                digest.update(part)

        put(_header(entries))
        for entry, tensor in zip(entries, tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
                raise ValueError(
                    f"{path.name}: tensor {entry.name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"announced as {entry.dtype} {entry.shape}"
                )
            put(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
        return FileFacts(file.tell(), digest.hexdigest())


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.bytes
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_json(path: Path, tree: Any) -> FileFacts:
    """Size and hash of the JSON file at `path`, which appears whole: others wait for it."""
    data = json.dumps(tree, indent=1).encode() + b"\n"
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    sync_folder(path.parent)
    return FileFacts(len(data), hashlib.sha256(data).hexdigest())


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
