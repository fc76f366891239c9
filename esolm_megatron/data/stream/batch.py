"""A batch of token rows, and what can give one for any step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from esolm_megatron.config import DataConfig
from esolm_megatron.data.shards import ShardEntry
from esolm_megatron.data.shards.shard_cache import CachedFolder


@dataclass(frozen=True)
class Damage:
    """A row that could not be read and was left blank; block and offset are those in its shard's folder."""

    source: str
    shard: str
    block: int
    offset: int
    row: int
    sample: int
    error: str


@dataclass(frozen=True)
class Batch:
    """Rows of tokens."""

    tokens: np.ndarray
    """int64 (rows, L)."""
    valid: np.ndarray
    """bool (rows, L); False where a short validation row is filled up with end-of-text, and all over a blank row."""
    rows: np.ndarray
    """int64 (rows,): place of each row in the global batch; in validation, its place in the split."""
    samples: np.ndarray
    """int64 (rows,): number of each row in the whole run; in validation, its place in the split."""
    documents: list[np.ndarray]
    """For each row, where inside it documents start; place 0 is left out."""
    damage: tuple[Damage, ...] = ()
    """The blank rows."""


class Batches(Protocol):
    """What can be read ahead."""

    config: DataConfig
    remote: bool

    def batch(self, step: int) -> Batch:
        """This rank's rows of the global batch of a step."""

    def remote_shards(self, step: int) -> list[tuple[CachedFolder, ShardEntry]]:
        """Remote shards that these rows are in."""

    def cancel(self, cancelled: bool) -> None:
        """End downloads early, or allow them again."""
