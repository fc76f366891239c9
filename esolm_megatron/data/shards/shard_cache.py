"""Remote shards on a local disk: each is fetched once on a node, checked, and dropped when room is wanted.

    CACHE/SHA256.data    a file under its own hash, so that two runs, or two copies of the data, share it
    CACHE/SHA256.part    a download, with its room already taken
    CACHE/SHA256.lock    held by the process that downloads; the kernel releases it when that process dies
    CACHE/SHA256.failed  why a download failed, for those who wait for it
    CACHE/SHA256.small   a manifest or another small file, under the hash of its address
    CACHE/room.lock      held while room is made

Whoever reads a file holds a shared lock on it, and a file that is locked is never dropped. What was fetched or
opened last is dropped last.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from esolm_megatron.config import DataConfig, is_remote
from esolm_megatron.data.shards.format import Folder, LocalTrouble, ShardCorrupt, ShardDamage, ShardEntry, ShardMissing
from esolm_megatron.data.shards.remote import Cancelled, Remote
from esolm_megatron.errors import DataError, shown

_POLL_S = 0.02
_KEPT_FOR_S = 6 * 3600.0
"""What was fetched ahead counts as used so much later, until it is opened: it must not go before its first row is read."""

_FRESH_S, _BEGAN = 60.0, time.time()
"""A small file is not fetched again if that was done since this process began, and so many seconds ago at most; nor is a shard
tried again so soon after all tries for it have failed."""
_ERRORS = {kind.__name__: kind for kind in (DataError, LocalTrouble, ShardCorrupt, ShardMissing)}


def open_folder(path: str | Path, config: DataConfig) -> Folder:
    """The folder of prepared tokens that `path` names, by way of the cache where it is elsewhere."""
    if not is_remote(str(path)):
        return Folder(str(path).removeprefix("file://"))
    if config.cache_dir is None:
        raise DataError(f"data.cache_dir = null: {shown(path)} is not on this machine; give a folder on a local disk")
    cache = Cache(config.cache_dir, int(config.cache_gb * 1e9), config.timeout_s)
    return CachedFolder(Remote(str(path), config.retries, config.timeout_s, config.min_mb_per_s * 1e6), cache)


@contextmanager
def _locked(path: Path, stop: threading.Event) -> Iterator[None]:
    """Hold the lock file `path` inside."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.wait(_POLL_S):
                    raise Cancelled(f"{path}: not waited for, for the run ends") from None
        yield
    finally:
        os.close(file)


class Cache:
    """A folder whose files take at most `limit` bytes."""

    def __init__(self, folder: str | Path, limit: int, patience_s: float):
        self.folder, self.limit, self.patience_s = Path(folder), limit, patience_s
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_dir = {folder}: {error.strerror or error}") from error

    def path(self, sha256: str, kind: str = "data") -> Path:
        """Where a file, its part or its lock lies."""
        return self.folder / f"{sha256}.{kind}"

    @contextmanager
    def part(self, sha256: str, size: int, what: str, stop: threading.Event) -> Iterator[int]:
        """An empty file of this process for `what`, open for writing, with room for `size` bytes; removed if it is still there.

        Raises:
            LocalTrouble: the disk is full, or everything in the cache is in use and stays so for `patience_s`.
        """
        path, deadline = self.path(sha256, "part"), time.monotonic() + self.patience_s
        try:
            while True:
                with _locked(self.folder / "room.lock", stop):
                    missing = self._make_room(size, path)
                    if missing <= 0:
                        file = self._reserved(path, size, what)  # before others count
                        break
                if time.monotonic() > deadline:
                    raise LocalTrouble(
                        f"data.cache_gb = {self.limit / 1e9:g}: {self.folder} is {missing} bytes short of room for {what}, "
                        "and all that is in it is in use; raise it, or lower data.num_lanes or data.prefetch_shards"
                    )
                stop.wait(10 * _POLL_S)
            try:
                yield file
            finally:
                os.close(file)
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def disk_full_named(self, size: int, what: str) -> Iterator[None]:
        """A disk that does not take `what` is written inside is an error that says what to free."""
        try:
            yield
        except OSError as error:
            raise LocalTrouble(
                f"data.cache_dir = {self.folder}: {error.strerror or error}; free {size} bytes on that disk for {what}, or "
                f"lower data.cache_gb = {self.limit / 1e9:g} so that the cache stays below what there is"
            ) from error

    def _reserved(self, path: Path, size: int, what: str) -> int:
        """A new file that takes `size` bytes from now on."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with self.disk_full_named(size, what):
                _take_room(file, size)
        except BaseException:
            os.close(file)
            raise
        return file

    def _make_room(self, size: int, own: Path) -> int:
        """Drop what was not used for longest until `size` more bytes fit; returns the bytes that are still missing."""
        own.unlink(missing_ok=True)  # of a process that died
        files = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith((".data", ".part", ".small")):
                with suppress(FileNotFoundError):
                    state = entry.stat()
                    files.append((state.st_mtime, state.st_size, Path(entry.path)))
        missing = sum(file[1] for file in files) + size - self.limit
        for _, bytes_, path in sorted(files):
            if missing <= 0:
                break
            if _dropped(path):
                missing -= bytes_
        return missing


def _dropped(path: Path) -> bool:
    """Whether the file could be removed, because nobody reads or writes it."""
    guard = path if path.suffix == ".data" else path.with_suffix(".lock")
    try:
        file = os.open(guard, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


class CachedFolder(Folder):
    """Prepared tokens that are elsewhere. Damage is found once; what fails otherwise may be tried again a minute later."""

    remote = True

    def __init__(self, source: Remote, cache: Cache):
        self.source, self.cache, self.path = source, cache, cache.folder
        self._failed: dict[str, tuple[float, DataError]] = {}
        self._distrusted: set[str] = set()
        self._turns: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def where(self, name: str) -> str:
        """What messages call a file."""
        return self.source.where(name)

    def read(self, name: str, fix: str) -> bytes:
        """The bytes of a small file; processes of the node that start together fetch it once."""
        key = hashlib.sha256(self.source.address(name).encode()).hexdigest()
        path = self.cache.path(key, "small")
        with self._alone(key):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime > max(_BEGAN, time.time() - _FRESH_S):
                    return path.read_bytes()
            data = self.source.fetch(name, b"".join)
            temporary = self.cache.path(key, "new")
            with self.cache.disk_full_named(len(data), self.where(name)):
                temporary.write_bytes(data)
                os.replace(temporary, path)
            return data

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Be the only process of the node inside. Who waited for one that failed fails like it: one budget of tries for all."""
        since, failed = time.time(), self.cache.path(key, "failed")
        with _locked(self.cache.path(key, "lock"), self.source.stop):
            with suppress(FileNotFoundError):
                if failed.stat().st_mtime >= since:
                    kind, _, text = failed.read_text(encoding="utf-8").partition("\n")
                    raise _ERRORS.get(kind, DataError)(text)
            try:
                yield
            except Cancelled:
                raise
            except DataError as error:
                with suppress(OSError):
                    failed.write_text(f"{type(error).__name__}\n{error}", encoding="utf-8")
                raise
            with suppress(OSError):
                failed.unlink(missing_ok=True)

    def read_index(self, sha256: str) -> bytes:
        """The bytes of blocks.npy, from the cache where it is there."""
        file = self._opened("blocks.npy", sha256, None)
        try:
            return os.pread(file, os.fstat(file).st_size, 0)
        finally:
            self.close(file)

    def open(self, shard: ShardEntry) -> int:
        """A file descriptor of a shard, which cannot be dropped until it is closed."""
        return self._opened(f"shards/{shard.name}", shard.sha256, shard.bytes)

    def check(self, shard: ShardEntry) -> None:
        """Nothing: a shard is checked when it arrives."""

    def bring(self, shard: ShardEntry) -> None:
        """Have a shard in the cache. Errors are kept for whoever opens it."""
        with suppress(DataError):
            self._ensure(f"shards/{shard.name}", shard.sha256, shard.bytes, ahead=True)

    def close(self, file: int) -> None:
        """Close what `open` gave; it counts as used until now."""
        with suppress(OSError):
            os.utime(file)
        os.close(file)

    def distrust(self, shard: ShardEntry, file: int) -> bool:
        """Drop a damaged copy; the first time, another may be better.

        Raises:
            LocalTrouble: the second time, for what arrived was whole: the cache's disk is to blame.
        """
        with suppress(OSError), open(file, "rb", closefd=False) as copy:
            copy.seek(0)
            if hashlib.file_digest(copy, "sha256").hexdigest() == shard.sha256:
                return False  # it is what was stored
        path = self.cache.path(shard.sha256)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file)):  # else somebody has replaced it already
                path.unlink(missing_ok=True)
        if shard.sha256 in self._distrusted:
            raise LocalTrouble(
                f"data.cache_dir = {self.cache.folder}: {self.where('shards/' + shard.name)} was damaged there twice after it "
                "had arrived whole; look at that disk"
            )
        self._distrusted.add(shard.sha256)
        return True

    def _opened(self, name: str, sha256: str, size: int | None) -> int:
        try:
            while True:
                self._ensure(name, sha256, size)
                with suppress(FileNotFoundError):  # dropped since
                    file = os.open(self.cache.path(sha256), os.O_RDWR)
                    fcntl.flock(file, fcntl.LOCK_SH)
                    if os.fstat(file).st_nlink:
                        with suppress(OSError):
                            os.utime(file)
                        return file
                    os.close(file)
        except OSError as error:
            raise LocalTrouble(f"data.cache_dir = {self.cache.folder}: {error}, for {self.where(name)}") from error

    def _ensure(self, name: str, sha256: str, size: int | None, *, ahead: bool = False) -> None:
        """Have a file in the cache; one thread of one process of the node fetches it, and the others wait."""
        with self._lock:
            turn = self._turns.setdefault(sha256, threading.Lock())
        with turn:
            when, failure = self._failed.get(sha256, (0.0, None))
            if failure and (isinstance(failure, ShardDamage) or time.monotonic() < when + _FRESH_S):
                raise failure
            if self._is_there(sha256, size):
                if ahead:
                    with suppress(OSError):
                        os.utime(self.cache.path(sha256), (time.time() + _KEPT_FOR_S,) * 2)
                return
            try:
                with self._alone(sha256):
                    if not self._is_there(sha256, size):
                        self._download(name, sha256, size, time.time() + ahead * _KEPT_FOR_S)
            except Cancelled:
                raise
            except DataError as error:
                self._failed[sha256] = time.monotonic(), error
                raise

    def _is_there(self, sha256: str, size: int | None) -> bool:
        try:
            found = self.cache.path(sha256).stat().st_size
        except FileNotFoundError:
            return False
        return found == size if size is not None else found > 0

    def _download(self, name: str, sha256: str, size: int | None, used: float) -> None:
        where, seen = self.where(name), set[tuple[int, str]]()
        with self.cache.part(sha256, size or 0, where, self.source.stop) as file:

            def take(chunks: Iterator[bytes]) -> None:
                digest, count = hashlib.sha256(), 0
                os.ftruncate(file, size or 0)
                os.lseek(file, 0, os.SEEK_SET)
                for chunk in chunks:
                    count += len(chunk)
                    if size is not None and count > size:
                        digest, count = hashlib.sha256(), size + 1  # and not what this try's chunks happen to be
                        break
                    digest.update(chunk)
                    with self.cache.disk_full_named(size or count, where):
                        _write(file, chunk)
                found = count, digest.hexdigest()
                if found[1] != sha256:
                    kind = ShardCorrupt if found in seen else DataError  # stored so, if it comes twice
                    seen.add(found)
                    raise kind(_other_bytes(where, found, size, sha256))

            try:
                self.source.fetch(name, take)
            except ShardMissing as error:
                self._check_manifest(error)
                raise
            os.utime(file, (used, used))
            with _locked(self.cache.folder / "room.lock", self.source.stop):  # whoever counts sees one of the names
                os.rename(self.cache.path(sha256, "part"), self.cache.path(sha256))

    def _check_manifest(self, missing: ShardMissing) -> None:
        """Raise DataError if the manifest is missing, too: then the whole place is, and it may come back."""
        try:
            self.source.fetch("manifest.json", lambda chunks: next(chunks, b""))
        except ShardMissing as error:
            raise DataError(f"{missing}; and neither is the manifest there: {error}") from error


def _other_bytes(where: str, found: tuple[int, str], size: int | None, sha256: str) -> str:
    """What is said of a file that is not the one of the manifest."""
    count, digest = found
    if size is None or count == size:
        return f"{where}: {count} bytes with sha256 {digest[:16]}..., the manifest says {count} with {sha256[:16]}..."
    more = " or more" * (count > size)
    return f"{where}: cut or replaced at offset {min(count, size)}: {count} bytes{more}, the manifest says {size} bytes"


def _take_room(file: int, size: int) -> None:
    """Have the disk set aside `size` bytes, where it can, so that a full one is found before the download."""
    try:
        if size:
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
            raise


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
