"""Files that are elsewhere, as bytes: http(s)://, s3:// and whatever else fsspec opens, and pipe: with a command."""

from __future__ import annotations

import base64
import http.client
import os
import queue
import random
import select
import shlex
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from typing import Any, TypeVar

from esolm_megatron.data.shards.format import LocalTrouble, ShardMissing
from esolm_megatron.errors import ConfigError, DataError, without_secrets

Result = TypeVar("Result")
CHUNK = 1 << 20
_FSSPEC_CHUNK = 1 << 23
_IN_PATHS, _IN_QUERIES = "/%:@!$&'()*+,;=~", "/%:@!$&'()*+,;=~?"
"""What needs no quotation in an address; its own are kept."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
_MAY_PASS = (408, 425, 429)
"""Refusals of HTTP that are worth another try; other 4xx are not."""
_GONE = (404, 410)
"""Of those, the ones that say that there is no such file; the others refuse it to this machine, or to these keys."""


class Cancelled(LocalTrouble):
    """A download that nobody waits for any more."""


class Remote:
    """A folder that is fetched file by file.

    root: http(s)://..., s3://..., or pipe:COMMAND, a shell command in which {name} stands for the file's name in the
    folder. A try fails when nothing comes for `timeout_s`, or when it is that much behind `slowest`, in bytes a second. Set `stop`
    to end downloads early.
    """

    def __init__(self, root: str, retries: int, timeout_s: float, slowest: float = 1e6):
        self.root, self.retries, self.timeout_s, self.slowest = root.rstrip("/"), retries, timeout_s, slowest
        self.stop = threading.Event()
        self._authorization = ""
        self._query = ""
        if root.startswith("http"):
            try:
                parts = urllib.parse.urlsplit(root, allow_fragments=False)
                _ = parts.port
            except ValueError:  # whose text may hold part of a password
                raise ConfigError(
                    "no address: look at host and port; write / and @ of a password as %2F and %40"
                ) from None
            self._query = f"?{urllib.parse.quote(parts.query, safe=_IN_QUERIES)}" if parts.query else ""
            user, at, host = parts.netloc.rpartition("@")
            if at:
                given = urllib.parse.unquote(user).encode()
                self._authorization = f"Basic {base64.b64encode(given).decode()}"
            path = urllib.parse.quote(parts.path.rstrip("/"), safe=_IN_PATHS)
            self.root = f"{parts.scheme}://{host}{path}"

    def patience_s(self, size: int) -> float:
        """Seconds after which all tries for a file of `size` bytes have failed, if they do."""
        waits = sum(1.5 * min(_FIRST_WAIT_S * 2**n, _LONGEST_WAIT_S) for n in range(self.retries))
        return waits + (self.retries + 1) * (2 * self.timeout_s + size / self.slowest)

    def where(self, name: str) -> str:
        """What messages call a file."""
        if self.root.startswith("pipe:"):
            return without_secrets(self.address(name))
        return f"{without_secrets(self.root)}/{name}{self._query and '?...'}"

    def address(self, name: str) -> str:
        """What a file is fetched by: it may hold what nobody may see, and tells apart what `where` calls alike."""
        if self.root.startswith("pipe:"):
            return self.root.replace("{name}", shlex.quote(name))
        return f"{self.root}/{name}{self._query}"

    def fetch(self, name: str, take: Callable[[Iterator[bytes]], Result]) -> Result:
        """What `take` makes of the chunks of a file. It is called again for each try, and raises for bad content.

        Raises:
            ShardMissing: the server says that there is no such file; at once.
            LocalTrouble, Cancelled: a refusal, or this machine's trouble; at once.
            ShardCorrupt: what `take` said of the last try.
            DataError: the last try's failure, which may pass.
        """
        problem: DataError | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                wait = min(_FIRST_WAIT_S * 2 ** (attempt - 1), _LONGEST_WAIT_S) * random.uniform(0.5, 1.5)
                self.stop.wait(wait)
            if self.stop.is_set():
                raise Cancelled(f"{self.where(name)}: not fetched, for the run ends")
            try:
                with closing(self._chunks(name)) as chunks:
                    return take(chunks)
            except (ShardMissing, LocalTrouble):
                raise
            except DataError as error:
                problem = error
        assert problem is not None
        tries = f"{self.retries + 1} tries" if self.retries else "one try"
        raise type(problem)(f"{problem} (after {tries})") from problem

    def _chunks(self, name: str) -> Generator[bytes]:
        """Chunks of the file; errors name the offset that they happened at."""
        url, offset, began = self.where(name), 0, time.monotonic()
        how = self._piped if url.startswith("pipe:") else self._http if url.startswith("http") else self._fsspec
        try:
            for chunk in how(self.address(name)):
                if self.stop.is_set():
                    raise Cancelled(f"{url}: not fetched, for the run ends")
                offset += len(chunk)
                spent = time.monotonic() - began
                if spent > self.timeout_s + offset / self.slowest:
                    raise DataError(
                        f"{url}: at offset {offset} after {spent:.1f} s: slower than data.min_mb_per_s = {self.slowest / 1e6:g}"
                    )
                yield chunk
        except urllib.error.HTTPError as error:
            error.close()
            if 400 <= error.code < 500 and error.code not in _MAY_PASS:
                kind = ShardMissing if error.code in _GONE else LocalTrouble
                raise kind(f"{url}: HTTP {error.code} {error.reason}; look at data.path") from error
            raise DataError(f"{url}: at offset {offset}: HTTP {error.code} {error.reason}") from error
        except (FileNotFoundError, PermissionError) as error:
            kind = ShardMissing if isinstance(error, FileNotFoundError) else LocalTrouble
            raise kind(f"{url}: {error}; look at data.path") from error
        except (OSError, http.client.HTTPException) as error:
            error = getattr(error, "reason", error)  # urllib wraps what happens while it connects
            said = f"nothing came for {self.timeout_s:g} s" if isinstance(error, TimeoutError) else f"{error!r}"
            raise DataError(f"{url}: at offset {offset}: {said}") from None

    def _http(self, url: str) -> Iterator[bytes]:
        request = urllib.request.Request(url)
        if self._authorization:  # and not to where the server sends us on, which may be another's
            request.add_unredirected_header("Authorization", self._authorization)
        with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
            left = answer.length  # None where the server does not say
            while chunk := answer.read1(CHUNK):
                left = None if left is None else left - len(chunk)
                yield chunk
            if left:
                raise ConnectionError(f"the connection ended {left} bytes early")

    def _piped(self, url: str) -> Iterator[bytes]:
        process = subprocess.Popen(url[len("pipe:") :], shell=True, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        try:
            # select() has no room for files numbered 1,024 and up
            file, answer = process.stdout.fileno(), select.poll()
            answer.register(file, select.POLLIN)
            while True:
                if not answer.poll(1000 * self.timeout_s):
                    raise TimeoutError
                chunk = os.read(file, CHUNK)
                if not chunk:
                    break
                yield chunk
            status = process.wait(self.timeout_s)
            if status:
                raise ConnectionError(f"the command ended with status {status}")
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()

    def _fsspec(self, url: str) -> Iterator[bytes]:
        try:
            yield from _watched(self._opened(url), self.timeout_s)
        except ImportError as error:
            said = without_secrets(url)
            if url.startswith(("s3://", "s3a://")):
                raise ConfigError(f"{said}: needs the package s3fs; pip install 'esolm-megatron[s3]'") from error
            raise LocalTrouble(f"{said}: {error}; install the package that opens it") from error
        except (OSError, GeneratorExit, DataError):
            raise
        except Exception as error:  # each of its backends has errors of its own
            raise ConnectionError(repr(error)) from error

    def _opened(self, url: str) -> Iterator[bytes]:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url, **_fsspec_options(url, self.timeout_s))
        with system.open(path, "rb", block_size=_FSSPEC_CHUNK) as file:
            while chunk := file.read(_FSSPEC_CHUNK):
                yield chunk


def _fsspec_options(url: str, timeout_s: float) -> dict[str, Any]:
    """What fsspec is told besides its own configuration: timeouts, and not to try again beneath our own tries."""
    if not url.startswith(("s3://", "s3a://")):
        return {}
    from fsspec.config import conf

    given = conf.get(url.partition("://")[0], {}).get("config_kwargs", {})
    ours = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"max_attempts": 0}}
    return {"config_kwargs": {**ours, **given}}


def _watched(chunks: Iterator[bytes], timeout_s: float) -> Iterator[bytes]:
    """The chunks, read by a thread that is left behind when nothing comes for `timeout_s`: few backends have a limit."""
    ready: queue.Queue[bytes | BaseException | None] = queue.Queue()
    wanted, left = threading.Semaphore(2), threading.Event()

    def read() -> None:
        try:
            for chunk in chunks:
                ready.put(chunk)
                wanted.acquire()
                if left.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # handed on, whatever it is
            ready.put(error)

    threading.Thread(target=read, name="fsspec", daemon=True).start()
    try:
        while (item := ready.get(timeout=timeout_s)) is not None:
            if isinstance(item, BaseException):
                raise item
            wanted.release()
            yield item
    except queue.Empty:
        raise TimeoutError from None
    finally:
        left.set()
        wanted.release(3)
