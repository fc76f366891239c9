"""Batches of token rows: the batch of any step, at once, without reading what came before.

    sample of the run -> source and number there (mixture.py) -> sequence (shuffle.py) -> block and offset -> tokens

All of it is arithmetic: the batch of a step is a function of (manifests, mixture, seed, step) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from esolm_megatron.config import Config, DataConfig
from esolm_megatron.data.shards import ShardEntry, ShardReader
from esolm_megatron.data.shards.format import ShardDamage
from esolm_megatron.data.shards.identity import summary
from esolm_megatron.data.shards.shard_cache import CachedFolder, open_folder
from esolm_megatron.data.stream.batch import Batch, Damage
from esolm_megatron.data.stream.mixture import Mixture, pattern, phases_of, setting_of, sources_of
from esolm_megatron.data.stream.prefetch import Prefetch
from esolm_megatron.data.stream.shuffle import Order, permutation
from esolm_megatron.errors import DataError, of_setting, shown


def data_config(data: DataConfig | str | Path, **fields: Any) -> DataConfig:
    """`data` itself, or the section for a path with other fields of it.

    Raises:
        DataError: a field is out of its range.
    """
    if isinstance(data, DataConfig):
        return data
    try:
        return DataConfig(path=str(data), **fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{'.'.join(map(str, first['loc']))} = {first['input']}: {first['msg']}") from error


class _Rows:
    """Rows of one split of one source, by (block, offset)."""

    def __init__(self, path: str, config: DataConfig, split: str, seq_length: int, *, blank: bool = False):
        if seq_length < 1:
            raise DataError(f"seq_length = {seq_length}: must be 1 or more")
        self.place = open_folder(path, config)
        self.reader = ShardReader(self.place, tolerant=config.on_corrupt == "skip")
        self.path, self.split, self.seq_length, self._blank = path, split, seq_length, blank
        self.blocks = self.reader.split_blocks(split)
        self.block_tokens = self.reader.blocks["num_tokens"][self.blocks].astype(np.int64)

    def read(
        self, places: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[tuple[int, int, DataError]]]:
        """Tokens, validity and document starts of the rows at `offsets` in the split's blocks `places`.

        The last are (row, block, error) of rows that were left blank. Nothing but lost or wrong bytes leaves one blank: with
        trouble that passes, a restart would train on other rows.

        Raises:
            DataError: a row could not be read; it names where that row is stored.
        """
        length, reader, eos = self.seq_length, self.reader, self.reader.manifest.eos_id
        counts = np.minimum(self.block_tokens[places] - offsets, length)
        stored, valid = np.empty((len(places), length), reader.dtype), np.ones((len(places), length), bool)
        documents: list[np.ndarray] = []
        lost: list[tuple[int, int, DataError]] = []
        bounds = np.stack([offsets + 1, offsets + counts], axis=1)
        numbers = self.blocks[places].tolist()
        for row, (block, start, count) in enumerate(zip(numbers, offsets.tolist(), counts.tolist(), strict=True)):
            try:
                starts = reader.read_into(block, start, stored[row] if count == length else stored[row, :count])
            except DataError as error:
                if not (self._blank and isinstance(error, ShardDamage)):
                    shard, offset = self.stored_at(block, start)
                    raise type(error)(f"{error}; wanted by the row at offset {offset} of {shard}") from error
                lost.append((row, block, error))
                count, starts = 0, np.empty(0, np.int64)
            if count < length:
                stored[row, count:], valid[row, count:] = eos, False
            low, high = starts.searchsorted(bounds[row]).tolist()
            documents.append(starts[low:high] - start)
        return stored.astype(np.int64), valid, documents, lost

    def stored_at(self, block: int, start: int = 0) -> tuple[str, int]:
        """Name of the shard that token `start` of a block is in, and its offset there."""
        record, reader = self.reader.blocks[block], self.reader
        shard = reader.manifest.shards[int(record["shard"])].name
        return shard, int(record["token_offset"]) + start * reader.dtype.itemsize


class Source(_Rows):
    """The rows of one source in their order. A row is `seq_length` tokens of one block; each comes once an epoch.

    What is left at the end of blocks is not used: `tokens_left_out` of them.
    """

    def __init__(
        self, path: str, config: DataConfig, split: str, seq_length: int, key: tuple[object, ...], batch_size: int
    ):
        super().__init__(path, config, split, seq_length, blank=config.on_corrupt == "skip")
        counts = self.block_tokens // seq_length
        self._first_sequence = np.concatenate([[0], np.cumsum(counts)])
        self.num_sequences = int(self._first_sequence[-1])
        self.tokens_left_out = int(self.block_tokens.sum()) - self.num_sequences * seq_length
        if not self.num_sequences:
            longest = int(self.block_tokens.max(initial=0))
            raise DataError(
                f"{path}: split {split!r} has no row of seq_length = {seq_length} tokens "
                f"(its longest block has {longest}); prepare more text, with a larger block_tokens, or train with a "
                "smaller seq_length"
            )
        self._owners = self.reader.blocks["shard"][self.blocks]
        first_block = np.flatnonzero(np.diff(self._owners, prepend=-1))
        per_shard = np.diff(self._first_sequence[first_block], append=self.num_sequences)
        self.order = Order(per_shard, key, config.num_lanes, config.shuffle_window)
        self._shard_numbers = self._owners[first_block]
        self._working_set = self.order.working_set(batch_size)
        self.reader.max_open = max(self.reader.max_open, self._working_set)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place in the split's blocks, and offset there, of this source's samples number `samples`."""
        sequences = self.order.sequences(samples)
        places = np.searchsorted(self._first_sequence, sequences, "right") - 1
        return places, (sequences - self._first_sequence[places]) * self.seq_length

    def release(self, samples: np.ndarray) -> None:
        """Let go of shards that are not read in turns while these samples are read: what is open stays in the cache."""
        self.reader.close_others(set(self._shard_numbers[self.order.live(samples)].tolist()))

    def shards(self, samples: np.ndarray) -> list[ShardEntry]:
        """The shards that these samples are in."""
        numbers = np.unique(self._owners[self.locate(samples)[0]])
        return [self.reader.manifest.shards[number] for number in numbers.tolist()]

    def working_bytes(self) -> tuple[int, int]:
        """Bytes that lie in the shards read in turns, and in the largest shard."""
        sizes = [shard.bytes for shard in self.reader.manifest.shards if shard.split == self.split]
        return sum(sorted(sizes)[-self._working_set :]), max(sizes)


def _put_together(
    parts: list[tuple[np.ndarray, Any, Any, Any]],
    rows: np.ndarray,
    samples: np.ndarray,
    damage: tuple[Damage, ...] = (),
) -> Batch:
    """The batch of what each source has: (places of its rows in the batch, tokens, validity, document starts)."""
    if len(parts) == 1:
        return Batch(parts[0][1], parts[0][2], rows, samples, parts[0][3], damage)
    order = np.argsort(np.concatenate([chosen for chosen, *_ in parts]))
    tokens, valid = (np.concatenate([part[n] for part in parts])[order] for n in (1, 2))
    starts = [start for part in parts for start in part[3]]
    return Batch(tokens, valid, rows, samples, [starts[n] for n in order.tolist()], damage)


class TokenStream:
    """The training rows of one data-parallel rank, for any step.

    data: the section of a configuration, or a folder with other fields of it. The global batch of a step is the same for
    every `data_size`. `vocab_size` counts the mask; `sources` are by name.

    Raises:
        DataError: sizes do not fit, sources do not go together, or one has no full row. Damaged files: see ShardReader.
        ConfigError: the weights have too many digits.
    """

    def __init__(
        self,
        data: DataConfig | str | Path,
        *,
        split: str = "train",
        seq_length: int,
        global_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        seed: int = 0,
        **fields: Any,
    ):
        self.config = config = data_config(data, **fields)
        if global_batch_size < 1:
            raise DataError(f"global_batch_size = {global_batch_size}: must be 1 or more")
        if not 0 <= data_rank < data_size:
            raise DataError(f"data_rank = {data_rank}: must be from 0 to data_size - 1 = {data_size - 1}")
        if global_batch_size % data_size:
            raise DataError(f"global_batch_size = {global_batch_size}: must be a multiple of data_size = {data_size}")
        self.split, self.seq_length, self.global_batch_size, self.seed = split, seq_length, global_batch_size, seed
        self.data_rank, self.data_size = data_rank, data_size
        self.mixture = Mixture(config, global_batch_size)
        for phase in self.mixture.phases:
            pattern(phase.weights)  # refuses weights now, and not at their step
        named = sources_of(config)
        self.sources = {}
        for name, source in named.items():
            key = (seed, name) if len(named) > 1 else (seed,)
            with of_setting(setting_of(config, name), source.path):
                self.sources[name] = Source(source.path, config, split, seq_length, key, global_batch_size)
        check_alike(self.sources)
        first = next(iter(self.sources.values()))
        self.vocab_size = first.reader.manifest.vocab_size + 1
        self._all = list(self.sources.values())
        self.remote = any(source.place.remote for source in self._all)
        self._check_cache()

    @classmethod
    def of(cls, config: Config, data_rank: int = 0, data_size: int = 1) -> TokenStream:
        """The training rows of a run."""
        length, size = config.model.seq_length, config.train.global_batch_size
        return cls(
            config.data, seq_length=length, global_batch_size=size, seed=config.seed, data_rank=data_rank,
            data_size=data_size,
        )  # fmt: skip

    def batch(self, step: int) -> Batch:
        """Rows of the global batch of `step`: r, r + R, r + 2R, ... for data rank r of R."""
        if step < 0:
            raise DataError(f"step = {step}: must be 0 or more")
        rows = np.arange(self.data_rank, self.global_batch_size, self.data_size, dtype=np.int64)
        places = self._places(step, rows)
        samples = step * self.global_batch_size + places
        parts, damage = [], []
        for name, chosen, own in self._dealt(step, places):
            source = self.sources[name]
            if source.place.remote:
                source.release(own)
            tokens, valid, starts, lost = source.read(*source.locate(own))
            parts.append((chosen, tokens, valid, starts))
            damage += [
                self._damage(name, block, rows[chosen[row]], samples[chosen[row]], error) for row, block, error in lost
            ]
        return _put_together(parts, rows, samples, tuple(damage))

    def _places(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Which sample of the batch each row is. Sources take turns, so rows of a mixture are permuted.

        Otherwise a source could always land on the same rank, or in the same part of the loss.
        """
        if len(self.sources) == 1:
            return rows
        return permutation(self.global_batch_size, self.seed, "rows", step)[rows]

    def _dealt(self, step: int, places: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """For each source that has some: which of `places` are its, and their numbers among its samples."""
        which, numbers = self.mixture.deal(step, places)
        for index, name in enumerate(self.mixture.names):
            chosen = np.flatnonzero(which == index)
            if len(chosen):
                yield name, chosen, numbers[chosen]

    def _damage(self, name: str, block: int, row: int, sample: int, error: DataError) -> Damage:
        shard, offset = self.sources[name].stored_at(block)
        return Damage(name, shard, block, offset, int(row), int(sample), str(error))

    def counts(self, num_batches: int) -> dict[str, dict[str, float]]:
        """Of each source, samples, tokens and epochs in the first `num_batches` global batches."""
        return {
            name: {
                "samples": n,
                "tokens": n * self.seq_length,
                "epochs": round(n / self.sources[name].num_sequences, 6),
            }
            for name, n in self.mixture.counts(num_batches).items()
        }

    def facts(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint remembers of each source; see identity.changes."""
        return {name: summary(source.reader, self.split) for name, source in self.sources.items()}

    def remote_shards(self, step: int) -> list[tuple[CachedFolder, ShardEntry]]:
        """Remote shards that this rank's rows of a step are in."""
        rows = np.arange(self.data_rank, self.global_batch_size, self.data_size, dtype=np.int64)
        return [
            (place, shard)
            for name, _, own in self._dealt(step, self._places(step, rows))
            if isinstance(place := self.sources[name].place, CachedFolder)
            for shard in self.sources[name].shards(own)
        ]

    def prefetch(self, start: int, stop: int | None = None, depth: int | None = None) -> Prefetch:
        """Batches of steps `start` to `stop` (None: for ever), read ahead by a thread. Close it, or use `with`."""
        return Prefetch(self, start, stop, self.config.prefetch_batches if depth is None else depth)

    def patience_s(self) -> float:
        """Seconds that a batch may take to come, or to fail, after all tries for a remote shard; 0 if there is none."""
        return max(
            (s.place.source.patience_s(s.working_bytes()[1]) for s in self._all if isinstance(s.place, CachedFolder)),
            default=0.0,
        )

    def cancel(self, cancelled: bool) -> None:
        """End downloads early, or allow them again."""
        for source in self._all:
            if isinstance(source.place, CachedFolder):
                (source.place.source.stop.set if cancelled else source.place.source.stop.clear)()

    def close(self) -> None:
        """Close the shards."""
        for source in self._all:
            source.reader.close()

    def _check_cache(self) -> None:
        """A cache that cannot hold what is read in turns would fetch the same shards again and again."""
        sizes = [source.working_bytes() for source in self._all if source.place.remote]
        if not sizes:
            return
        manifests = [s.reader.manifest for s in self._all if s.place.remote]
        total = sum(shard.bytes for m in manifests for shard in m.shards)
        others = sum(max((x.bytes for x in m.shards if x.split != self.split), default=0) for m in manifests)
        ahead = self.config.prefetch_shards * max(largest for _, largest in sizes)
        wanted = min(sum(turns for turns, _ in sizes) + ahead + others, total)
        if wanted > self.config.cache_gb * 1e9:
            raise DataError(
                f"data.cache_gb = {self.config.cache_gb:g}: the shards read in turns and those fetched ahead take "
                f"{wanted / 1e9:.6g} GB; raise it, or lower data.num_lanes, data.shuffle_window or data.prefetch_shards"
            )


def check_alike(sources: dict[str, Any]) -> None:
    """Raise DataError unless all sources have the tokenizer of the first one."""
    (first, model), *others = sources.items()
    for name, source in others:
        a, b = model.reader.manifest, source.reader.manifest
        for field in ("vocab_size", "eos_id", "tokenizer_fingerprint"):
            was, now = getattr(a, field), getattr(b, field)
            if was != now:
                raise DataError(
                    f"data.sources: {first} has {field} {was}, {name} has {now}; prepare both with the same tokenizer"
                )


class ValidationSet:
    """Every token of a split exactly once, in storage order, as rows of `seq_length`; `len()` counts the rows.

    The last row of a block may be short: it is filled up with end-of-text and marked in `valid`. Sources of a mixture take
    turns by the weights that the run begins with, for as many rows as the first that runs out of them allows.

    Raises:
        DataError: the split is empty. Damaged files are errors here whatever `data.on_corrupt` says.
    """

    def __init__(self, data: DataConfig | str | Path, *, split: str = "validation", seq_length: int):
        config = data_config(data)
        named, weights = sources_of(config), phases_of(config)[0].weights
        used = [(name, source) for (name, source), weight in zip(named.items(), weights, strict=True) if weight]
        self._sources: list[_Rows] = []
        for name, place in used:
            with of_setting(setting_of(config, name), place.path) if data is config else nullcontext():
                self._sources.append(_Rows(place.path, config, split, seq_length))
        for source in self._sources:
            if source.place.remote:  # an open shard cannot leave the cache, and rows come in the order of the shards
                source.reader.max_open = 1
        self._pattern = pattern(tuple(weight for weight in weights if weight))
        self._first_row = [np.concatenate([[0], np.cumsum(-(-s.block_tokens // seq_length))]) for s in self._sources]
        for source, first in zip(self._sources, self._first_row, strict=True):
            if not first[-1]:
                raise DataError(
                    f"{shown(source.path)}: split {split!r} is empty; prepare with another validation_fraction or more documents"
                )
        check_alike(dict(zip((name for name, _ in used), self._sources, strict=True)))
        self.manifest, self.seq_length = self._sources[0].reader.manifest, seq_length
        self._length = self._rows_that_last()

    def __len__(self) -> int:
        return self._length

    def _rows_that_last(self) -> int:
        """The largest number of rows for which no source is asked for more than it has."""
        sizes = [int(first[-1]) for first in self._first_row]
        low, high = 0, sum(sizes)
        while low < high:
            middle = (low + high + 1) // 2
            if all(a <= b for a, b in zip(self._pattern.counts(middle), sizes, strict=True)):
                low = middle
            else:
                high = middle - 1
        return low

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
        which, numbers = self._pattern.deal(index)
        parts = []
        for number, (source, first) in enumerate(zip(self._sources, self._first_row, strict=True)):
            chosen = np.flatnonzero(which == number)
            places = np.searchsorted(first, numbers[chosen], "right") - 1
            parts.append((chosen, *source.read(places, (numbers[chosen] - first[places]) * self.seq_length)[:3]))
        return _put_together(parts, index, index)

    def close(self) -> None:
        """Close the shards."""
        for source in self._sources:
            source.reader.close()
