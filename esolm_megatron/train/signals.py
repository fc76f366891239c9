"""What ranks tell each other in a step."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T", float, np.ndarray)


class Signals(NamedTuple, Generic[T]):
    """One rank's numbers (float), or those of all ranks: each (world_size,) fp64, and the same on every rank."""

    loss: T
    """As this rank's tokens gave it, before anything is summed over ranks; 0 where it saw none."""
    fingerprint: T
    """Of its norms and biases."""
    busy_s: T
    """Seconds that it computed."""
    stop_asked: T
    """Whether a signal asked it to end the run."""
    save_failed: T
    """Whether it could not write its part of a checkpoint."""
    batch_lost: T
    """Whether the batch could not be read."""
    blank_rows: T
    """Rows of the batch that were left blank."""
