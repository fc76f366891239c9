"""Safetensors files written tensor by tensor, hashed on the way, and on the disk when the call returns; and read likewise."""

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
from safetensors import SafetensorError, safe_open
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

INDEX_SUFFIX = ".safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


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


class TensorFolderError(ValueError):
    """Safetensors files that are missing, not whole, or hold no floating numbers."""


class TensorFolder:
    """The tensors of STEM.safetensors, or of the files that STEM.safetensors.index.json lists, read one at a time.

    shapes: name -> shape; dtypes: name -> dtype, of all tensors. A file is open only while a tensor is read: the pages of
    an open one would count as this process's memory.

    Raises:
        TensorFolderError: a file is missing, cut short or no safetensors file, or a tensor is of no floating type.
    """

    def __init__(self, folder: str | Path, stem: str = "model"):
        self.folder = Path(folder)
        index = self.folder / f"{stem}{INDEX_SUFFIX}"
        wanted: dict[str, str] | None = None
        if index.is_file():
            try:
                wanted = json.loads(index.read_bytes())["weight_map"]
                self.files = [self.folder / Path(name).name for name in sorted(set(wanted.values()))]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise TensorFolderError(f"{index}: cannot be read as an index of tensors: {error!r}") from error
        else:
            self.files = [self.folder / f"{stem}.safetensors"]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._where: dict[str, Path] = {}
        for path in self.files:
            self._list(path)
        for name in wanted or ():
            if name not in self._where:
                raise TensorFolderError(f"{index}: names tensor {name}, which no file holds; copy the files again")

    def _list(self, path: Path) -> None:
        if not path.is_file():
            raise TensorFolderError(f"{path}: missing; copy it from where the other files came from")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    part = file.get_slice(name)
                    if part.get_dtype() not in _FLOATS:
                        raise TensorFolderError(
                            f"{path}: tensor {name} is {part.get_dtype()}; weights must be one of {', '.join(_FLOATS)}"
                        )
                    if name in self._where:
                        raise TensorFolderError(f"{path}: tensor {name} is in {self._where[name].name} too")
                    self._where[name], self.shapes[name] = path, tuple(part.get_shape())
                    self.dtypes[name] = next(dtype for dtype, code in _CODES.items() if code == part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise TensorFolderError(
                f"{path}: is no whole safetensors file: {error}; copy or convert it again"
            ) from error

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype, on the CPU."""
        path = self._where[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise TensorFolderError(f"{path}: {name} cannot be read: {error}; copy or convert it again") from error
