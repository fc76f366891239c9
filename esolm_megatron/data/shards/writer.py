"""The writing half of the format of prepared tokens, which format.py tells: files that appear whole, shards, blocks.

The processes of `prepare` need no more than this; it reads nothing and checks nothing, so it costs little to import.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "validation")


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step that outlives a crash of the machine."""
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rename_durably(temporary, path)


def rename_durably(old: Path, new: Path) -> None:
    """Rename within a folder, and flush the folder."""
    os.replace(old, new)
    folder = os.open(new.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def npy_bytes(array: np.ndarray) -> bytes:
    """`array` as the content of a .npy file."""
    return _npy_header(array) + array.tobytes()


def _npy_header(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(array))
    return out.getvalue()


class ShardWriter:
    """Tar shards STEM-000.tar, STEM-001.tar, ... of blocks; each appears under its name only when it is complete.

    After `close`, `shards` lists {"name", "bytes", "sha256", "tokens", "blocks"}, blocks as BLOCK_DTYPE fields without
    split and shard.
    """

    def __init__(self, folder: Path, stem: str, shard_tokens: int):
        self.shards: list[dict[str, Any]] = []
        self._folder, self._stem, self._shard_tokens = folder, stem, shard_tokens
        self._file: io.BufferedWriter | None = None

    def add(self, key: str, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Append a block: its n + 1 tokens and its document starts."""
        if self._file is None:
            self._open()
        token_place = self._member(f"{key}.tokens.npy", tokens)
        document_place = self._member(f"{key}.docs.npy", documents.astype("<u4"))
        self._blocks.append(
            [token_place[0], len(tokens) - 1, token_place[1], document_place[0], len(documents), document_place[1]]
        )
        self._tokens += len(tokens) - 1
        if self._tokens >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        """Finish the shard being written, if any."""
        if self._file is None:
            return
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        name = f"{self._stem}-{len(self.shards):03d}.tar"
        rename_durably(self._temporary, self._folder / name)
        entry = {"name": name, "bytes": self._bytes, "sha256": self._hash.hexdigest(), "tokens": self._tokens}
        self.shards.append({**entry, "blocks": self._blocks})

    def _open(self) -> None:
        self._temporary = self._folder / f"{self._stem}-{len(self.shards):03d}.tar.tmp.{os.getpid()}"
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by close()
        self._hash, self._bytes, self._tokens = hashlib.sha256(), 0, 0
        self._blocks: list[list[int]] = []

    def _write(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)
        self._bytes += memoryview(data).nbytes

    def _member(self, name: str, array: np.ndarray) -> tuple[int, int]:
        """Offset and crc32 of the array's bytes in the member written."""
        header, info = _npy_header(array), tarfile.TarInfo(name)
        info.size, info.mode = len(header) + array.nbytes, 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT) + header)
        offset = self._bytes
        self._write(array.data)  # megabytes, which are never copied
        self._write(bytes(-info.size % tarfile.BLOCKSIZE))
        return offset, zlib.crc32(array.data)


class Packer:
    """Documents laid end to end, cut into blocks of `block_tokens` and the token that follows."""

    def __init__(self, writer: ShardWriter, key: str, block_tokens: int, dtype: np.dtype, eos_id: int):
        self.documents = self.tokens = 0
        self.writer, self._key, self._eos_id, self._size = writer, key, eos_id, block_tokens
        self._buffer = np.empty(block_tokens + 1, dtype)
        self._filled = self._blocks = 0
        self._starts: list[int] = []

    def add(self, ids: np.ndarray) -> None:
        """Append a document and its end-of-text token."""
        self._starts.append(self._filled)
        self.documents += 1
        self.tokens += len(ids) + 1
        while len(ids) >= (room := self._size + 1 - self._filled):
            self._buffer[self._filled :] = ids[:room]
            ids = ids[room:]
            self._emit(self._size)
        end = self._filled + len(ids)
        self._buffer[self._filled : end] = ids
        self._buffer[end] = self._eos_id
        self._filled = end + 1
        if self._filled > self._size:
            self._emit(self._size)

    def close(self) -> None:
        """Write what is left as a short block; an end-of-text token stands for the one that follows."""
        if self._filled:
            self._buffer[self._filled] = self._eos_id
            self._emit(self._filled)
        self.writer.close()

    def _emit(self, size: int) -> None:
        starts = np.asarray(self._starts, np.int64)
        self.writer.add(f"{self._key}-{self._blocks:06d}", self._buffer[: size + 1], starts[starts < size])
        self._starts = (starts[starts >= size] - size).tolist()
        self._buffer[0] = self._buffer[size]
        self._filled = 1
        self._blocks += 1
