"""Reading `torch.save` files without running them: plain values and tensors come out, every class stays a name.

A pickle is a program that may call anything importable. Here nothing is importable: whatever it names becomes an inert
stand-in that records its arguments and state, so that plain values inside foreign objects can still be looked up.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")


class TorchZipError(ValueError):
    """A file that is no whole `torch.save` archive, or that holds what cannot be read as data."""


class Inert:
    """What stands for an object of a class, or for the result of a call, named `origin` in the pickle."""

    origin = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        """An object that remembers its arguments."""
        self = object.__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Keep an element."""
        self.items.append(value)


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype | None
    key: str
    numel: int


class _Reader(pickle.Unpickler):
    """Builds dicts, lists, tuples, numbers and text; all else is Inert."""

    def find_class(self, module: str, name: str) -> Any:
        """An inert class of that name; never the real one, but for the plain ordered dict."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type("Inert", (Inert,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> _Storage:
        """The place of a tensor's data in the archive."""
        tag, kind, key, _, numel = pid
        if tag != "storage" or not isinstance(key, str) or not isinstance(numel, int):
            raise pickle.UnpicklingError(f"unknown reference {tag!r}")
        return _Storage(_STORAGES.get(getattr(kind, "origin", "").removeprefix("torch.")), key, numel)


class TorchZip:
    """An opened archive. tree: what was saved, with tensors as references that `tensor` resolves one at a time.

    Raises:
        TorchZipError: it is cut short, damaged, or no archive.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._zip = zipfile.ZipFile(self.path)
            pickles = [name for name in self._zip.namelist() if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise TorchZipError(f"{self.path}: holds {len(pickles)} data.pkl, a torch.save archive has one")
            self._root = pickles[0].removesuffix("data.pkl")
            order = f"{self._root}byteorder"
            if order in self._zip.namelist() and self._zip.read(order) != b"little":
                raise TorchZipError(
                    f"{self.path}: was saved on a big-endian machine; save it again on a little-endian one"
                )
            with self._zip.open(pickles[0]) as file:
                self.tree: Any = _Reader(file, encoding="latin1").load()
        except TorchZipError:
            raise
        except OSError as error:
            raise TorchZipError(f"{self.path}: cannot be read: {error}") from error
        except zipfile.BadZipFile as error:
            raise TorchZipError(
                f"{self.path}: is no whole torch.save archive: {error}; copy it again "
                "(what torch before 1.6 wrote must be saved anew)"
            ) from error
        except Exception as error:  # what a broken or hostile pickle raises has no bounds
            raise TorchZipError(
                f"{self.path}: its pickle is broken, or wants to do more than hold data: {error}"
            ) from error

    def tensor(self, node: Any, name: str) -> Tensor:
        """The tensor that `node` of the tree refers to, on the CPU; `name` is for errors.

        Raises:
            TorchZipError: it is no tensor, or its data is missing, cut short or damaged.
        """
        while isinstance(node, Inert) and node.origin in _PARAMETERS and node.args:
            node = node.args[0]
        if not isinstance(node, Inert) or node.origin not in _TENSORS or len(node.args) < 4:
            found = node.origin if isinstance(node, Inert) else type(node).__name__
            raise TorchZipError(f"{self.path}: {name} is no tensor that can be read, but {found}")
        storage, start, size, stride = node.args[:4]
        if not isinstance(storage, _Storage) or storage.dtype is None:
            raise TorchZipError(f"{self.path}: {name} has a storage type that cannot be read")
        numbers = [start, *_numbers(size), *_numbers(stride)]
        if len(_numbers(size)) != len(_numbers(stride)) or any(not isinstance(n, int) or n < 0 for n in numbers):
            raise TorchZipError(f"{self.path}: {name} has size {size!r} and stride {stride!r}")
        last = start + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= storage.numel:
            raise TorchZipError(f"{self.path}: {name} reaches beyond its data of {storage.numel} elements")
        return torch.as_strided(self._data(storage, name), size, stride, start).clone()

    def _data(self, storage: _Storage, name: str) -> Tensor:
        assert storage.dtype is not None
        member, size = f"{self._root}data/{storage.key}", storage.numel * storage.dtype.itemsize
        try:
            found = self._zip.getinfo(member).file_size
            if found != size:
                raise TorchZipError(f"{self.path}: the data of {name} has {found} bytes where {size} belong")
            data = self._zip.read(member)
        except KeyError as error:
            raise TorchZipError(f"{self.path}: the data of {name} ({member}) is missing") from error
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise TorchZipError(f"{self.path}: the data of {name} is damaged: {error}") from error
        return torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)


def _numbers(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (None,)


def child(node: Any, *path: str) -> Any:
    """The plain value under `path` in dicts, foreign objects' attributes and OmegaConf containers; None where there is none."""
    for name in path:
        inside = _plain(node)
        if not isinstance(inside, dict) or name not in inside:
            return None
        node = inside[name]
    return _plain(node)


def _plain(node: Any) -> Any:
    """What a foreign object holds: OmegaConf keeps `_content` in containers and `_val` in leaves, others their attributes."""
    if isinstance(node, Inert):
        state = node.state
        if not isinstance(state, dict):
            return None
        return state["_content"] if "_content" in state else state.get("_val", state)
    return node
