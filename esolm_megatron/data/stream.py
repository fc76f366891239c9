"""Batches of token rows: the batch of any step, at once, without reading what came before.

The order is arithmetic. In each epoch the shards are permuted, and their sequences laid end to end and cut into lanes
of equal length; consecutive samples of the run take turns over the lanes, and each lane is permuted within windows.
Data that fits into lanes x window is one window: a full permutation.

    sample g -> epoch g // n -> lane -> place in its window -> sequence in its shard -> block and offset

Permutations are stable argsorts of raw Philox words, which numpy promises never to change, keyed by name: the batch of
a step is a function of (manifest, seed, step) alone.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np

from esolm_megatron.data.shards import DataError, ShardReader


@dataclass(frozen=True)
class Batch:
    """Rows of tokens."""

    tokens: np.ndarray
    """int64 (rows, L)."""
    valid: np.ndarray
    """bool (rows, L); False where a short validation row is filled up with end-of-text."""
    rows: np.ndarray
    """int64 (rows,): place of each row in the global batch; in validation, its place in the split."""
    samples: np.ndarray
    """int64 (rows,): number of each row in the whole run; in validation, its place in the split."""
    documents: list[np.ndarray]
    """For each row, where inside it documents start; place 0 is left out."""


def permutation(n: int, *names: object) -> np.ndarray:
    """int64 (n,): the permutation that belongs to `names`, equal on all machines and numpy versions."""
    text = "|".join(map(str, names)).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


class _Rows:
    """Rows of one split, by (block, offset)."""

    def __init__(self, path: str | Path, split: str, seq_length: int):
        if seq_length < 1:
            raise DataError(f"seq_length = {seq_length}: must be 1 or more")
        self.reader = ShardReader(path)
        self.split, self.seq_length = split, seq_length
        self.blocks = self.reader.split_blocks(split)
        self.block_tokens = self.reader.blocks["num_tokens"][self.blocks].astype(np.int64)

    def read(self, places: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Tokens, validity and document starts of the rows at `offsets` in the split's blocks `places`."""
        length, reader = self.seq_length, self.reader
        stored = np.full((len(places), length), reader.manifest.eos_id, reader.dtype)
        counts = np.minimum(self.block_tokens[places] - offsets, length)
        documents = []
        numbers = self.blocks[places].tolist()
        for row, (block, start, count) in enumerate(zip(numbers, offsets.tolist(), counts.tolist(), strict=True)):
            reader.read_into(block, start, stored[row, :count])
            starts = reader.documents(block)
            low, high = starts.searchsorted((start + 1, start + count))
            documents.append(starts[low:high] - start)
        return stored.astype(np.int64), np.arange(length) < counts[:, None], documents


class TokenStream:
    """The training rows of one data-parallel rank, for any step.

    A row is `seq_length` tokens of one block; what is left at the end of blocks is not used: `tokens_left_out` of them.
    Each of the `num_sequences` rows comes exactly once an epoch, and the global batch of a step is the same for every
    `data_size`. `vocab_size` counts the mask. `fingerprint` identifies the data: keep it with the step to resume.

    Raises:
        DataError: sizes do not fit, or the split has no full row. Damaged files: see ShardReader.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        seq_length: int,
        global_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        seed: int = 0,
        num_lanes: int = 16,
        shuffle_window: int = 512,
    ):
        for name, value in (
            ("global_batch_size", global_batch_size),
            ("num_lanes", num_lanes),
            ("shuffle_window", shuffle_window),
        ):
            if value < 1:
                raise DataError(f"{name} = {value}: must be 1 or more")
        if not 0 <= data_rank < data_size:
            raise DataError(f"data_rank = {data_rank}: must be from 0 to data_size - 1 = {data_size - 1}")
        if global_batch_size % data_size:
            raise DataError(f"global_batch_size = {global_batch_size}: must be a multiple of data_size = {data_size}")
        self._source = _Rows(path, split, seq_length)
        self.manifest, self.fingerprint = self._source.reader.manifest, self._source.reader.fingerprint
        self.vocab_size = self.manifest.vocab_size + 1
        self.seq_length, self.global_batch_size, self.seed = seq_length, global_batch_size, seed
        self.data_rank, self.data_size = data_rank, data_size
        self._layout()
        small = self.num_sequences <= num_lanes * shuffle_window
        self.num_lanes = 1 if small else num_lanes
        self.shuffle_window = self.num_sequences if small else shuffle_window
        self._epoch = lru_cache(maxsize=4)(self._draw_epoch)
        self._window = lru_cache(maxsize=4 * self.num_lanes + 16)(self._draw_window)

    def batch(self, step: int) -> Batch:
        """Rows of the global batch of `step`: r, r + R, r + 2R, ... for data rank r of R."""
        if step < 0:
            raise DataError(f"step = {step}: must be 0 or more")
        rows = np.arange(self.data_rank, self.global_batch_size, self.data_size, dtype=np.int64)
        samples = step * self.global_batch_size + rows
        sequences = self._sequences(samples)
        places = np.searchsorted(self._first_sequence, sequences, "right") - 1
        offsets = (sequences - self._first_sequence[places]) * self.seq_length
        tokens, valid, documents = self._source.read(places, offsets)
        return Batch(tokens, valid, rows, samples, documents)

    def prefetch(self, start: int, stop: int | None = None, depth: int = 4) -> Prefetch:
        """Batches of steps `start` to `stop` (None: for ever), read ahead by a thread. Close it, or use `with`."""
        return Prefetch(self, start, stop, depth)

    def close(self) -> None:
        """Close the shards."""
        self._source.reader.close()

    def _layout(self) -> None:
        source = self._source
        counts = source.block_tokens // self.seq_length
        self._first_sequence = np.concatenate([[0], np.cumsum(counts)])
        self.num_sequences = int(self._first_sequence[-1])
        self.tokens_left_out = int(source.block_tokens.sum()) - self.num_sequences * self.seq_length
        if not self.num_sequences:
            longest = int(source.block_tokens.max(initial=0))
            raise DataError(
                f"{source.reader.folder}: split {source.split!r} has no row of seq_length = {self.seq_length} tokens "
                f"(its longest block has {longest}); prepare more text, with a larger block_tokens, or train with a "
                "smaller seq_length"
            )
        owners = source.reader.blocks["shard"][source.blocks]
        first_block = np.flatnonzero(np.diff(owners, prepend=-1))
        self._first_of_shard = self._first_sequence[first_block]
        self._per_shard = np.diff(self._first_of_shard, append=self.num_sequences)

    def _sequences(self, samples: np.ndarray) -> np.ndarray:
        """Storage number, within the split, of the sequence that each sample reads."""
        epochs, within = np.divmod(samples, self.num_sequences)
        places, lanes = np.divmod(within, self.num_lanes)
        short, longer = divmod(self.num_sequences, self.num_lanes)
        lengths = short + (lanes < longer)
        num_windows = -(-lengths // self.shuffle_window)
        windows = ((places + 1) * num_windows - 1) // lengths
        out = np.empty_like(samples)
        triples, inverse = np.unique(np.stack([epochs, lanes, windows]), axis=1, return_inverse=True)
        inverse = inverse.reshape(-1)
        for number, (epoch, lane, window) in enumerate(triples.T.tolist()):
            chosen = inverse == number
            length = short + (lane < longer)
            count = -(-length // self.shuffle_window)
            low, high = window * length // count, (window + 1) * length // count
            base = lane * short + min(lane, longer) + low
            moved = base + self._window(epoch, lane, window, high - low)[places[chosen] - low]
            shards, ends = self._epoch(epoch)
            at = np.searchsorted(ends, moved, "right")
            shard = shards[at]
            out[chosen] = self._first_of_shard[shard] + moved - (ends[at] - self._per_shard[shard])
        return out

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of `epoch`, and where each one's sequences end in it."""
        order = permutation(len(self._per_shard), self.seed, "shards", epoch)
        return order, np.cumsum(self._per_shard[order])

    def _draw_window(self, epoch: int, lane: int, window: int, size: int) -> np.ndarray:
        return permutation(size, self.seed, "window", epoch, lane, window)


class Prefetch(Iterator[Batch]):
    """An iterator of batches that a thread reads ahead; what fails in the thread is raised in `next`."""

    def __init__(self, stream: TokenStream, start: int, stop: int | None, depth: int):
        if depth < 1:
            raise DataError(f"prefetch depth = {depth}: must be 1 or more")
        self._stream, self._start, self._end = stream, start, stop
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._read_ahead, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        item = self._next_item()
        if isinstance(item, Batch):
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
                continue
        return None

    def close(self) -> None:
        """Stop the thread and wait for it; batches already read are dropped."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_ahead(self) -> None:
        step = self._start
        try:
            while not self._stop.is_set() and (self._end is None or step < self._end):
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


class ValidationSet:
    """Every token of a split exactly once, in storage order, as rows of `seq_length`; `len()` counts the rows.

    The last row of a block may be short: it is filled up with end-of-text and marked in `valid`.

    Raises:
        DataError: the split is empty.
    """

    def __init__(self, path: str | Path, *, split: str = "validation", seq_length: int):
        self._source = _Rows(path, split, seq_length)
        self.manifest, self.fingerprint = self._source.reader.manifest, self._source.reader.fingerprint
        self._first_row = np.concatenate([[0], np.cumsum(-(-self._source.block_tokens // seq_length))])
        if not len(self):
            raise DataError(f"{path}: split {split!r} is empty; prepare with a larger validation_fraction or more text")

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def rows(self, indices: np.ndarray | list[int] | range) -> Batch:
        """Rows number `indices`.

        Raises:
            DataError: an index is outside 0 .. len - 1.
        """
        index = np.asarray(indices, np.int64)
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise DataError(
                f"row {index[(index < 0) | (index >= len(self))][0]}: the split has rows 0 to {len(self) - 1}"
            )
        places = np.searchsorted(self._first_row, index, "right") - 1
        offsets = (index - self._first_row[places]) * self._source.seq_length
        tokens, valid, documents = self._source.read(places, offsets)
        return Batch(tokens, valid, index, index, documents)

    def close(self) -> None:
        """Close the shards."""
        self._source.reader.close()
