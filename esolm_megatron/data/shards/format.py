"""The format of prepared tokens: webdataset-readable tar shards, an index of their blocks, and a manifest.

    FOLDER/manifest.json      what is there; written last, so a folder without it is not finished
    FOLDER/blocks.npy         one BLOCK_DTYPE record a block: where it lies and its crc32
    FOLDER/tokenizer/         the tokenizer
    FOLDER/shards/SPLIT-TASK-PART.tar    members KEY.tokens.npy and KEY.docs.npy

A block of n tokens is stored as n + 1: the last is a look-ahead, the token that follows. KEY.docs.npy holds where in
the block documents start (uint32). Every document ends with the end-of-text token. Headers carry no time and no
owner: equal input gives equal bytes. Plain `webdataset` opens the shards; this reader does not use it, for it loses
damaged samples in silence.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from esolm_megatron.config.section import Section
from esolm_megatron.data.shards.writer import SPLITS, npy_bytes, write_durably
from esolm_megatron.errors import DataError

FORMAT_VERSION = 1
BLOCK_DTYPE = np.dtype(
    [
        ("split", "u1"),
        ("shard", "<u4"),
        ("token_offset", "<u8"),
        ("num_tokens", "<u4"),
        ("token_crc", "<u4"),
        ("document_offset", "<u8"),
        ("num_documents", "<u4"),
        ("document_crc", "<u4"),
    ]
)
_OPEN_SHARDS = 128
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_WORTH_ANOTHER_TRY = (errno.ESTALE, errno.EIO)
"""Network file systems say these when a server was started anew; what is opened then is whole."""
_KEPT_DOCUMENTS = 1024
Result = TypeVar("Result")


class ShardDamage(DataError):
    """Stored bytes are lost or wrong, for every rank and after every restart. Only this may leave a row blank.

    Trouble of any other kind passes, or belongs to a machine: rows left out for it would be other ones the next time.
    """


class ShardMissing(ShardDamage):
    """A file of the prepared data is not there, though its folder is."""


class ShardCorrupt(ShardDamage):
    """A file of the prepared data is not what was written."""


class LocalTrouble(DataError):
    """This machine's trouble, or a refusal, which another try at once would not change."""


class ShardEntry(Section):
    """One tar file."""

    name: str
    split: str
    bytes: int
    sha256: str
    tokens: int
    blocks: int


class SplitCounts(Section):
    """What a split holds."""

    documents: int
    tokens: int
    blocks: int


class SourceCounts(Section):
    """What came from one entry of `inputs`."""

    name: str
    """The entry; of a path, its last part."""
    text_bytes: int
    """UTF-8 bytes of its kept documents."""
    documents: dict[str, int]
    """Its documents read, kept, and left out, by reason."""


class Manifest(Section):
    """What a folder of prepared tokens holds. It names no machine and no path."""

    format_version: int
    tokenizer_fingerprint: str
    vocab_size: int
    """Tokens without the mask."""
    eos_id: int
    dtype: str
    """uint16 or uint32."""
    seed: int
    block_tokens: int
    validation_fraction: float
    text_bytes: int
    """UTF-8 bytes of the kept documents."""
    documents: dict[str, int]
    """Documents read, kept, and left out, by reason."""
    sources: tuple[SourceCounts, ...] = ()
    """The same for each entry of `inputs`."""
    splits: dict[str, SplitCounts]
    blocks_sha256: str
    shards: tuple[ShardEntry, ...]


class Folder:
    """Prepared tokens on this machine's disks; data/shards/shard_cache.py has the same for those that are elsewhere."""

    remote = False

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def where(self, name: str) -> str:
        """What messages call a file."""
        return str(self.path / name)

    def read(self, name: str, fix: str) -> bytes:
        """The bytes of a small file.

        Raises:
            ShardMissing: it is not there; with `fix`, what to do about it.
            LocalTrouble: it could not be read.
        """
        return self._asked(name, (self.path / name).read_bytes, fix)

    def read_index(self, sha256: str) -> bytes:
        """The bytes of blocks.npy; whoever asks compares the hash."""
        return self.read("blocks.npy", "copy the whole folder again")

    def open(self, shard: ShardEntry) -> int:
        """A file descriptor of a shard.

        Raises:
            ShardMissing: it is not there.
            LocalTrouble: it could not be opened.
        """
        name = f"shards/{shard.name}"
        return self._asked(name, lambda: os.open(self.path / name, os.O_RDONLY))

    def check(self, shard: ShardEntry) -> None:
        """Raise ShardMissing or ShardCorrupt if a shard is not there, or has another size; LocalTrouble if nobody can say."""
        name = f"shards/{shard.name}"
        found = self._asked(name, lambda: (self.path / name).stat().st_size)
        if found != shard.bytes:
            raise ShardCorrupt(
                f"{self.where(name)}: cut or replaced at offset {min(found, shard.bytes)}: {found} bytes, the manifest "
                f"says {shard.bytes}; copy or prepare this shard again"
            )

    def _asked(self, name: str, ask: Callable[[], Result], fix: str = "copy or prepare this shard again") -> Result:
        """What `ask` finds out about a file. It is lost only if the folder that it belongs to can still be seen."""
        try:
            return _tried(ask)
        except OSError as error:
            text = f"{self.where(name)}: {error.strerror or error}"
            if error.errno not in _ABSENT:
                raise LocalTrouble(f"{text}; that is this machine's trouble and not the data's, look there") from error
            if name != "manifest.json" and not os.path.exists(self.path / "manifest.json"):
                raise LocalTrouble(f"{text}, and neither is the manifest; bring the whole folder back") from error
            raise ShardMissing(f"{text}; {fix}") from error

    def distrust(self, shard: ShardEntry, file: int) -> bool:
        """Told that the open `file` of a shard is damaged: whether opening it again may give a better one."""
        return False

    def close(self, file: int) -> None:
        """Close what `open` gave."""
        os.close(file)


class ShardReader:
    """Blocks of prepared tokens by number, each checked against its crc32 when first touched. Safe to share by threads.

    `blocks` is the BLOCK_DTYPE index, `fingerprint` the sha256 of the manifest. tolerant: shards that are missing or cut
    are found when they are read, not at once.

    Raises:
        ShardMissing: the folder, its manifest or a shard is not there.
        ShardCorrupt: the manifest, the index or the size of a shard is wrong.
    """

    def __init__(self, folder: str | Path | Folder, *, tolerant: bool = False):
        self.place = folder if isinstance(folder, Folder) else Folder(folder)
        self.folder = self.place.path
        raw = self.place.read("manifest.json", "prepare the data, or finish an interrupted prepare by running it again")
        self.manifest = _parse_manifest(self.place.where("manifest.json"), raw)
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        index = self.place.read_index(self.manifest.blocks_sha256)
        if hashlib.sha256(index).hexdigest() != self.manifest.blocks_sha256:
            raise ShardCorrupt(f"{self.place.where('blocks.npy')}: does not match manifest.json; copy both again")
        self.blocks: np.ndarray = np.load(io.BytesIO(index), allow_pickle=False)
        self._shard_of, self._token_offset = (self.blocks[name].astype(np.int64) for name in ("shard", "token_offset"))
        self._itemsize = self.dtype.itemsize
        for shard in () if tolerant else self.manifest.shards:
            self.place.check(shard)
        self._checked = np.zeros(len(self.blocks), bool)
        self._bad: dict[int, ShardDamage] = {}
        self._files: OrderedDict[int, int] = OrderedDict()
        self.max_open = _OPEN_SHARDS
        self._documents: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.RLock()

    def shard_path(self, shard: int) -> Path:
        """Where shard number `shard` lies."""
        return self.folder / "shards" / self.manifest.shards[shard].name

    def split_blocks(self, split: str) -> np.ndarray:
        """Numbers of the blocks of `split`, int64, in storage order."""
        if split not in SPLITS:
            raise DataError(f"split = {split!r}: must be one of {', '.join(SPLITS)}")
        return np.flatnonzero(self.blocks["split"] == SPLITS.index(split))

    def read_into(self, block: int, start: int, out: np.ndarray) -> np.ndarray:
        """Fill `out` (contiguous, of the stored dtype) with tokens of `block` from `start` on; returns `documents(block)`."""
        starts = self.documents(block)
        self._pread(self._shard_of.item(block), self._token_offset.item(block) + start * self._itemsize, out)
        return starts

    def documents(self, block: int) -> np.ndarray:
        """Where documents start in `block`, int64, rising."""
        with self._lock:
            found = self._documents.get(block)
            if found is None:
                found = self._documents[block] = self._check(block)
                if len(self._documents) > _KEPT_DOCUMENTS:
                    self._documents.popitem(last=False)
            return found

    def close_others(self, shards: set[int]) -> None:
        """Close all shards but these, so that a cache may drop them."""
        with self._lock:
            for shard in self._files.keys() - shards:
                self.place.close(self._files.pop(shard))

    def close(self) -> None:
        """Close the shards; a later read opens them again and trusts no earlier check."""
        with self._lock:
            while self._files:
                self.place.close(self._files.popitem()[1])
            self._documents.clear()
            self._bad.clear()
            self._checked[:] = False

    def _check(self, block: int) -> np.ndarray:
        """Document starts of a block, all of which is checked; a damaged copy in a cache is fetched again once."""
        if block in self._bad:
            raise self._bad[block]
        try:
            try:
                return self._check_once(block)
            except ShardCorrupt:
                if not self._drop(int(self.blocks[block]["shard"])):
                    raise
                return self._check_once(block)
        except ShardDamage as error:
            self._bad[block] = error
            raise

    def _check_once(self, block: int) -> np.ndarray:
        record = self.blocks[block]
        shard = int(record["shard"])
        starts = np.empty(int(record["num_documents"]), "<u4")
        self._pread(shard, int(record["document_offset"]), starts)
        self._check_crc(block, "document", starts)
        if not self._checked[block]:
            tokens = np.empty(int(record["num_tokens"]) + 1, self.dtype)
            self._pread(shard, int(record["token_offset"]), tokens)
            self._check_crc(block, "token", tokens)
            self._checked[block] = True
        return starts.astype(np.int64)

    def _check_crc(self, block: int, what: str, array: np.ndarray) -> None:
        record, found = self.blocks[block], zlib.crc32(array.data)
        path, offset, said = self._where(int(record["shard"])), record[f"{what}_offset"], int(record[f"{what}_crc"])
        if found != said:
            raise ShardCorrupt(
                f"{path}: {what}s of block {block} at offset {offset} have crc32 {found:08x}, the index says "
                f"{said:08x}; copy or prepare this shard again"
            )

    def _where(self, shard: int) -> str:
        return self.place.where(f"shards/{self.manifest.shards[shard].name}")

    def _pread(self, shard: int, offset: int, out: np.ndarray) -> None:
        if not out.nbytes:
            return
        try:
            with self._lock:
                count, size = _tried(lambda: self._read_once(shard, offset, out), lambda: self._drop(shard))
        except OSError as error:
            raise LocalTrouble(f"{self._where(shard)}: cannot be read at offset {offset}: {error}") from error
        if count < out.nbytes:
            kind = ShardCorrupt if size < offset + out.nbytes else LocalTrouble  # a short answer, though all is there
            raise kind(
                f"{self._where(shard)}: cut at offset {size} after it was opened, {out.nbytes} bytes are wanted at "
                f"{offset}; copy or prepare this shard again"
            )

    def _read_once(self, shard: int, offset: int, out: np.ndarray) -> tuple[int, int]:
        """Bytes that were read and, where they are too few, those that the file has."""
        file = self._file(shard)
        count = os.preadv(file, [out.data], offset)
        return count, 0 if count == out.nbytes else os.fstat(file).st_size

    def _drop(self, shard: int) -> bool:
        """Close a shard that is not trusted; whether opening it again may give a better copy."""
        file = self._files.pop(shard, None)
        try:
            return file is not None and self.place.distrust(self.manifest.shards[shard], file)
        finally:
            if file is not None:
                self.place.close(file)

    def _file(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = self.place.open(self.manifest.shards[shard])
            if len(self._files) > self.max_open:
                self.place.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(shard)
        return file


def _tried(read: Callable[[], Result], between: Callable[[], object] = lambda: None) -> Result:
    """What `read` returns; where the system's error may be gone at once, it is called again after `between`."""
    try:
        return read()
    except OSError as error:
        if error.errno not in _WORTH_ANOTHER_TRY:
            raise
        between()
        return read()


def _parse_manifest(path: str, raw: bytes) -> Manifest:
    try:
        tree = json.loads(raw)
        version = tree["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardCorrupt(f"{path}: is no manifest of prepared tokens: {error!r}; copy it again") from error
    if version != FORMAT_VERSION:
        raise ShardCorrupt(
            f"{path}: has format_version {version}, this program reads {FORMAT_VERSION}; prepare the data again"
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ShardCorrupt(f"{path}: field {where}: {first['msg']}; copy it again") from error


def write_manifest(folder: Path, manifest: dict[str, Any], blocks: np.ndarray) -> None:
    """Write the index, then the manifest, completed by format_version and blocks_sha256: the folder is now finished."""
    data = npy_bytes(blocks)
    write_durably(folder / "blocks.npy", data)
    tree = {"format_version": FORMAT_VERSION, **manifest, "blocks_sha256": hashlib.sha256(data).hexdigest()}
    Manifest.model_validate(tree)
    write_durably(folder / "manifest.json", (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode())
