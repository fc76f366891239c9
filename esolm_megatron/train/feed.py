"""What a run reads: one rank of each model replica reads its rows, and the others of the replica get them from it.

A reader that fails does not raise at once, for the other ranks would wait for it in their next collective. It hands out
a blank batch; the step is refused, and all ranks learn of it with the step's other signals and raise together.
"""

from __future__ import annotations

import traceback
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np

from esolm_megatron.config import Config, ConfigError, DataConfig, UserError
from esolm_megatron.data.shards.identity import changes
from esolm_megatron.data.stream import Batch, TokenStream, ValidationSet
from esolm_megatron.data.stream.mixture import ONLY_SOURCE, first_difference, phases_of, sources_of
from esolm_megatron.data.stream.prefetch import Prefetch
from esolm_megatron.errors import DataError
from esolm_megatron.parallel.engine import Engine
from esolm_megatron.train.guard import Guard, kept
from esolm_megatron.train.signals import Signals

_FEW, _SHARE = 1000, 8
_HEAD = 1  # words before those of the rows: whether the reader failed


def most_corrupt_rows(limit: int | None, rows_so_far: int) -> int:
    """Blank rows that a run may have.

    Without a limit it is an eighth of what was read, and a few. One shard of eight or more is never that much, for it is
    read in two lanes of `data.num_lanes` (16) at a time, at most; windows of rows make the few.
    """
    return _FEW + rows_so_far // _SHARE if limit is None else limit


class Feed:
    """The batches of a run, on every rank. They are taken ahead of their steps, so what was wrong is kept by number."""

    def __init__(self, config: Config, engine: Engine, guard: Guard):
        self.config, self.engine, self.guard = config, engine, guard
        self._failures: dict[int, Exception] = {}
        self._damage: dict[int, tuple[Any, ...]] = {}
        self._prefetch: Prefetch | None = None
        self.corrupt_rows, self._listed = 0, -1
        top = engine.topology
        rows = np.arange(top.data_rank, config.train.global_batch_size, top.data_size, dtype=np.int64)
        self.blank: Batch = _blank(rows, config.model.seq_length)
        self.stream = TokenStream.of(config, top.data_rank, top.data_size) if engine.reads else None
        self.facts: dict[str, Any] = engine.from_first_rank(self.stream.facts() if self.stream else None)
        self.patience_s: float = engine.from_first_rank(self.stream.patience_s() if self.stream else None)
        """Seconds after which a batch has come, or failed."""

    def batches(self, first: int) -> Generator[tuple[int, Batch]]:
        """(number, batch) of this replica from number `first` on, without those that the guard leaves out. For ever."""
        self._failures.clear()  # those of batches that were taken ahead of a rollback, and never fed
        self._damage.clear()
        with closing(self._read(first)) as read:
            for number, found in kept(read, first, self.guard):
                batch = _shared(self.engine, self._mine(number, found), self.blank)
                if batch is None and number not in self._failures:
                    self._failures[number] = DataError("the rank that reads for this one failed")
                yield number, self.blank if batch is None else batch

    def _read(self, first: int) -> Generator[Batch | Exception | None]:
        """Batches of the reading rank, and what stopped it, for ever; None for ever on the others."""
        if self.stream is None:
            while True:
                yield None
        with self.stream.prefetch(first) as batches:
            self._prefetch = batches
            while True:
                try:
                    yield next(batches)
                except Exception as error:
                    yield error

    def _mine(self, number: int, batch: Batch | Exception | None) -> Batch | None:
        if isinstance(batch, Exception):
            self._failures[number] = batch
            return None
        if batch is not None and batch.damage:
            self._damage[number] = batch.damage
        return batch

    def stop_reading(self) -> None:
        """Let `batches` end, from another thread than the one that waits in it; call it before its `close`."""
        if self._prefetch is not None:
            self._prefetch.close()

    def failed(self, number: int) -> bool:
        """Whether this rank could not get a batch."""
        return number in self._failures

    def blank_rows(self, number: int) -> int:
        """Rows of a batch that this rank left blank."""
        return len(self._damage.get(number, ()))

    def settle(self, number: int, told: Signals[np.ndarray]) -> None:
        """Act on what all ranks told of batch `number`: list blank rows in events.jsonl, and end the run if it must.

        Raises:
            DataError: on every rank, for a batch that one could not read, or for too many blank rows.
        """
        if told.batch_lost.any():
            failure = self._failures.get(number)
            own = _text(failure) if self.stream is not None and failure is not None else ""
            told_all = _told(self.engine, own)
            raise failure if own and failure is not None else told_all
        if told.blank_rows.any():
            found = [asdict(damage) for part in self.engine.everywhere(self._damage.pop(number, ())) for damage in part]
            for damage in sorted(found, key=lambda d: d["row"]) if number > self._listed else ():
                self.guard.event("corrupt_row", batch=number, **damage)
            self._listed = max(self._listed, number)  # after a rollback the same rows come again
            self.corrupt_rows += len(found)
            limit, rows = self.config.data.max_corrupt_rows, (number + 1) * self.config.train.global_batch_size
            if self.corrupt_rows > most_corrupt_rows(limit, rows):
                raise DataError(
                    f"data.max_corrupt_rows = {'null' if limit is None else limit}: {self.corrupt_rows} rows could not be "
                    f"read, of {rows} so far, the last because {found[-1]['error']}; mend the shards listed in events.jsonl, "
                    "or raise it"
                )

    def restore(self, numbers: dict[str, Any]) -> None:
        """Count blank rows from a checkpoint's numbers on."""
        self.corrupt_rows = numbers.get("corrupt_rows", 0)

    def counts(self, number: int) -> dict[str, Any]:
        """What was read of each source for the batches before `number` that were not left out; on the first rank."""
        if self.stream is None:
            return {}
        total = self.stream.counts(number)
        for batch in self.guard.skipped:
            if batch < number:
                before, after = self.stream.counts(batch), self.stream.counts(batch + 1)
                for name, count in total.items():
                    for key in count:
                        count[key] = round(count[key] - after[name][key] + before[name][key], 6)
        return total

    def check_same(self, manifest: dict[str, Any], number: int) -> None:
        """Raise ConfigError if a checkpoint's manifest is of other data, or other weights before batch `number`."""
        was, where = manifest["data_fingerprint"], f"step {manifest['step']} was trained on"
        if isinstance(was, str):  # of a checkpoint from before there were sources
            was = {ONLY_SOURCE: {"fingerprint": was}}
        found = changes(was, self.facts)
        if found:
            raise ConfigError(
                f"data: is not what {where}:\n" + "\n".join(found) + "\nrestore it, or start a run with another name"
            )
        fields = ("path", "sources", "weight_changes")
        old = DataConfig(**{k: v for k, v in manifest["config"]["data"].items() if k in fields})
        new = self.config.data
        differs = first_difference(phases_of(old), list(sources_of(old)), phases_of(new), list(sources_of(new)))
        if differs is not None and differs < number:
            raise ConfigError(
                f"data.sources, data.weight_changes: weights from batch {differs} on are not those that {where}, and "
                f"{number} batches are done; restore them, and change weights from {number} on"
            )

    def close(self) -> None:
        """Close the shards."""
        if self.stream is not None:
            self.stream.close()


class ValidationFeed:
    """Validation rows, on every rank; read once in a replica. `len()` counts them."""

    def __init__(self, config: Config, engine: Engine):
        self.engine, self.length = engine, config.model.seq_length
        self._set = ValidationSet(config.data, seq_length=self.length) if engine.reads else None
        self._size: int = engine.from_first_rank(len(self._set) if self._set is not None else None)

    def __len__(self) -> int:
        return self._size

    def rows(self, parts: list[np.ndarray]) -> list[Batch]:
        """A batch of rows for each of `parts`, which are as many on all ranks.

        Raises:
            DataError: on every rank, where one could not read its rows.
        """
        out, error = [], ""
        for part in parts:
            mine: Batch | None = None
            if self._set is not None and not error:
                try:
                    mine = self._set.rows(part)
                except Exception as problem:
                    error = _text(problem)
            out.append(_shared(self.engine, mine, _blank(part, self.length)))
        if self.engine.any_rank(any(batch is None for batch in out)):
            raise _told(self.engine, error)
        return [batch for batch in out if batch is not None]


def _told(engine: Engine, own: str) -> DataError:
    """What all ranks say went wrong, of which this rank says `own`; every rank must ask."""
    said = [f"rank {rank}: {text}" for rank, text in enumerate(engine.everywhere(own)) if text]
    return DataError("\n".join(said))


def _text(error: Exception | None) -> str:
    """What other ranks say about an error: what a user can mend, or all there is to know."""
    if isinstance(error, UserError):
        return str(error)
    return "".join(traceback.format_exception(error))


def _blank(rows: np.ndarray, length: int) -> Batch:
    """A batch of these rows that weighs nothing."""
    tokens = np.zeros((len(rows), length), np.int64)
    return Batch(tokens, np.zeros(tokens.shape, bool), rows, rows, [np.empty(0, np.int64)] * len(rows))


def _shared(engine: Engine, batch: Batch | None, blank: Batch) -> Batch | None:
    """The batch of the rank that reads for this replica; None if it has none. blank: a batch of the same shape."""
    if not engine.shares_rows:
        return batch
    words = engine.from_reader(_packed(batch or blank, failed=batch is None))
    return _unpacked(words, blank.tokens.shape) if words[0] == 0 else None


def _packed(batch: Batch, *, failed: bool) -> np.ndarray:
    """int64 words of one length for batches of one shape: status, rows, samples, tokens with two flags each."""
    flags = batch.valid.astype(np.int64)
    for row, starts in enumerate(batch.documents):
        flags[row, starts] |= 2
    return np.concatenate([[int(failed)], batch.rows, batch.samples, (batch.tokens << 2 | flags).ravel()])


def _unpacked(words: np.ndarray, shape: tuple[int, ...]) -> Batch:
    count = shape[0]
    rows, samples, cells = np.split(words[_HEAD:], [count, 2 * count])
    cells = cells.reshape(shape)
    documents = [np.flatnonzero(row & 2) for row in cells]
    return Batch(cells >> 2, (cells & 1).astype(bool), rows, samples, documents)
