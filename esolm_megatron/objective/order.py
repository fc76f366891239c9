"""Generation orders: `order[k]` is the sequence position generated k-th.

Orders are made by sorting integers. The reference sorts left-to-right places by float offsets, which breaks beyond 2^23.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LAST = np.uint64(1) << np.uint64(63)


def random_order(raw: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A uniformly random order of each row. raw (..., L) words -> (..., L)."""
    return np.argsort(raw, axis=-1, kind="stable")


def clean_then_masked_random(masked: NDArray[np.bool_], raw: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Clean places first, masked ones after them, each group in random order (the diffusion part)."""
    return np.argsort((raw >> np.uint64(1)) | (masked * _LAST), axis=-1, kind="stable")


def clean_random_then_left_to_right(masked: NDArray[np.bool_], raw: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Clean places first in random order, then masked ones left to right (the sequential part)."""
    position = np.arange(masked.shape[-1], dtype=np.uint64)
    return np.argsort(np.where(masked, _LAST | position, raw >> np.uint64(1)), axis=-1, kind="stable")


def inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """When each position is generated: inverse(order)[..., order[..., k]] = k."""
    return np.argsort(order, axis=-1, kind="stable")
