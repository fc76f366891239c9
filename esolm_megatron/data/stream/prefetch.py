"""Batches read before they are wanted, and remote shards fetched before they are read."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from esolm_megatron.data.shards import ShardEntry
from esolm_megatron.data.shards.shard_cache import CachedFolder
from esolm_megatron.data.stream.batch import Batch, Batches
from esolm_megatron.errors import DataError

_DOWNLOADS = 4
_STEPS_AHEAD, _POLL_S = 1000, 0.02


class Prefetch(Iterator[Batch]):
    """An iterator of batches that a thread reads ahead; what fails in the thread is raised in `next`."""

    def __init__(self, stream: Batches, start: int, stop: int | None, depth: int):
        if depth < 1:
            raise DataError(f"prefetch depth = {depth}: must be 1 or more")
        self._stream, self._start, self._end = stream, start, stop
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        stream.cancel(False)
        self._shards = ShardsAhead(stream, start, stop) if stream.remote else None
        self._thread = threading.Thread(target=self._read_ahead, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        item = self._next_item()
        if item is not None and not isinstance(item, BaseException):
            return item
        self.close()
        if item is None:
            raise StopIteration
        self._failure = item
        raise item

    def _next_item(self) -> Batch | BaseException | None:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=1)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    return DataError("the thread that reads batches has died; see what it wrote above")
        return None

    def close(self) -> None:
        """Stop the threads and wait for them; batches already read are dropped."""
        self._stop.set()
        self._stream.cancel(True)
        self._thread.join()
        if self._shards is not None:
            self._shards.close()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        step = self._start
        try:
            while not self._stop.is_set() and (self._end is None or step < self._end):
                if self._shards is not None:
                    self._shards.reading = step
                self._put(self._stream.batch(step))
                step += 1
            self._put(None)
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.05)
            except queue.Full:
                continue


class ShardsAhead:
    """Threads that have the shards of coming steps in the cache before the reader asks for them.

    Which they are is arithmetic. At most `data.prefetch_shards` are on their way or waiting for their first step. `reading`
    is the step that the reader is at; set it.
    """

    def __init__(self, stream: Batches, start: int, stop: int | None):
        self.reading = start
        self._stream, self._start, self._end = stream, start, stop
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(_DOWNLOADS, "fetch")
        self._thread = threading.Thread(target=self._look_ahead, name="shards ahead", daemon=True)
        self._thread.start()

    def _look_ahead(self) -> None:
        first: dict[str, int] = {}  # by shard, the step that it was asked for
        last: dict[str, int] = {}  # and the last known step that reads it
        step = self._start
        while not self._stop.is_set() and (self._end is None or step < self._end):
            if step > self.reading + _STEPS_AHEAD:
                self._stop.wait(_POLL_S)
                continue
            for shard in [shard for shard, when in last.items() if when < self.reading]:
                del first[shard], last[shard]
            for place, entry in self._stream.remote_shards(step):
                if entry.sha256 not in first:
                    self._wait_for_turn(first)
                    first[entry.sha256] = step
                    self._pool.submit(self._bring, step, place, entry)
                last[entry.sha256] = step
            step += 1

    def _bring(self, step: int, place: CachedFolder, entry: ShardEntry) -> None:
        if step > self.reading:  # else the reader has fetched it, and may be done with it
            place.bring(entry)

    def _wait_for_turn(self, first: dict[str, int]) -> None:
        """Wait until fewer than `data.prefetch_shards` wait for their first step."""
        most = self._stream.config.prefetch_shards
        while not self._stop.is_set() and sum(when > self.reading for when in first.values()) >= most:
            self._stop.wait(_POLL_S)

    def close(self) -> None:
        """Stop looking and fetching."""
        self._stop.set()
        self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)
