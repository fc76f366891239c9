"""The order in which a source's sequences come, by arithmetic alone.

In each epoch the shards are permuted, and their sequences laid end to end and cut into lanes of equal length; consecutive
samples take turns over the lanes, and each lane is permuted within windows. Data that fits into lanes x window is one
window: a full permutation.

    sample k of a source -> epoch k // n -> lane -> place in its window -> sequence in its shard

Permutations are stable argsorts of raw Philox words, which numpy promises never to change, keyed by name.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


def permutation(n: int, *names: object) -> np.ndarray:
    """int64 (n,): the permutation that belongs to `names`, equal on all machines and numpy versions."""
    text = "|".join(map(str, names)).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


class Order:
    """Which sequence each sample of a source reads. per_shard: sequences of each shard, in storage order; key: its names."""

    def __init__(self, per_shard: np.ndarray, key: tuple[object, ...], num_lanes: int, shuffle_window: int):
        self._per_shard, self._key = per_shard, key
        self._first_of_shard = np.cumsum(per_shard) - per_shard
        self.num_sequences = int(per_shard.sum())
        small = self.num_sequences <= num_lanes * shuffle_window
        self.num_lanes = 1 if small else num_lanes
        self.shuffle_window = self.num_sequences if small else shuffle_window
        self._epoch = lru_cache(maxsize=4)(self._draw_epoch)
        self._window = lru_cache(maxsize=4 * self.num_lanes + 16)(self._draw_window)

    def sequences(self, samples: np.ndarray) -> np.ndarray:
        """Storage number of the sequence that each sample reads; samples are counted from the start of the run."""
        epochs, within = np.divmod(samples, self.num_sequences)
        places, lanes = np.divmod(within, self.num_lanes)
        short, longer = divmod(self.num_sequences, self.num_lanes)
        lengths = short + (lanes < longer)
        num_windows = -(-lengths // self.shuffle_window)
        windows = ((places + 1) * num_windows - 1) // lengths
        lows = windows * lengths // num_windows
        sizes = (windows + 1) * lengths // num_windows - lows
        wanted = zip(*(x.tolist() for x in (epochs, lanes, windows, sizes, places - lows)), strict=True)
        moved = lanes * short + np.minimum(lanes, longer) + lows  # one by one: a batch has few rows of each window
        moved += np.array([self._window(*window)[place] for *window, place in wanted], np.int64)
        out = np.empty_like(samples)
        for epoch in set(epochs.tolist()):
            chosen = epochs == epoch
            shards, ends = self._epoch(epoch)
            at = np.searchsorted(ends, moved[chosen], "right")
            shard = shards[at]
            out[chosen] = self._first_of_shard[shard] + moved[chosen] - (ends[at] - self._per_shard[shard])
        return out

    def live(self, samples: np.ndarray) -> np.ndarray:
        """Numbers of the shards that the windows of all lanes are in while these samples are read."""
        (first, low), (last, high) = (divmod(int(k), self.num_sequences) for k in (samples.min(), samples.max()))
        low, high, end = low // self.num_lanes, high // self.num_lanes, self.num_sequences // self.num_lanes
        if first == last:
            return self._spanned(first, low, high)
        between = [self._spanned(epoch, 0, end) for epoch in range(first + 1, last)]
        return np.unique(np.concatenate([self._spanned(first, low, end), *between, self._spanned(last, 0, high)]))

    def working_set(self, batch_size: int) -> int:
        """Most shards that `live` has for a batch: each lane's windows may begin and end inside a shard."""
        held = self._per_shard[self._per_shard > 0]
        if self.shuffle_window >= self.num_sequences:
            return len(held)
        smallest_first, rows = np.cumsum(np.sort(held)), -(-batch_size // self.num_lanes) + self.shuffle_window
        inside = int(np.searchsorted(smallest_first, rows + self.shuffle_window)) + 2
        at_turn_of_epoch = 2 * int(np.searchsorted(smallest_first, rows)) + 4
        return min(self.num_lanes * max(inside, at_turn_of_epoch), len(held))

    def _spanned(self, epoch: int, low: int, high: int) -> np.ndarray:
        """Shards of the windows that places `low` to `high` of the lanes are in."""
        lanes = np.arange(self.num_lanes)
        short, longer = divmod(self.num_sequences, self.num_lanes)
        lengths, starts = short + (lanes < longer), lanes * short + np.minimum(lanes, longer)
        counts = -(-lengths // self.shuffle_window)
        windows = [((np.minimum(place, lengths - 1) + 1) * counts - 1) // lengths for place in (low, high)]
        shards, ends = self._epoch(epoch)
        begin = np.searchsorted(ends, starts + windows[0] * lengths // counts, "right")
        end = np.searchsorted(ends, starts + (windows[1] + 1) * lengths // counts - 1, "right")
        return np.unique(np.concatenate([shards[a : b + 1] for a, b in zip(begin, end, strict=True)]))

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of `epoch`, and where each one's sequences end in it."""
        order = permutation(len(self._per_shard), *self._key, "shards", epoch)
        return order, np.cumsum(self._per_shard[order])

    def _draw_window(self, epoch: int, lane: int, window: int, size: int) -> np.ndarray:
        return permutation(size, *self._key, "window", epoch, lane, window)
