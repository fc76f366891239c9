"""Random numbers that depend on nothing but their names, and the times and masks drawn with them.

A draw is keyed by (seed, step, purpose, global row): it is the same on every number of ranks and after every restart.
Only raw Philox words are used, whose stream NumPy freezes; its distribution methods may change between versions.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def words(count: int, *key: int | str) -> NDArray[np.uint64]:
    """`count` random 64-bit words that are a function of `key`."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)  # type: ignore[return-value]


def uniforms(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words as numbers in [0, 1) with 53 random bits."""
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def alpha(t: NDArray[np.float64], alpha_0: float, epsilon: float) -> NDArray[np.float64]:
    """Probability that a token is clean at time t: alpha_0 (1 - (1 - eps) t)."""
    return alpha_0 * (1 - (1 - epsilon) * t)


def elbo_weight(t: NDArray[np.float64], alpha_0: float, epsilon: float) -> NDArray[np.float64]:
    """What -log p of a masked token counts at time t in the bound: -alpha'(t) / (1 - alpha(t))."""
    return alpha_0 * (1 - epsilon) / (1 - alpha(t, alpha_0, epsilon))


def antithetic_times(indices: NDArray[np.int64], count: int, epsilon: float, *key: int | str) -> NDArray[np.float64]:
    """Times in [epsilon, 1] of some rows of a batch of `count`: one offset for all, one stratum for each row.

    t_i = ((u + i) / n) mod 1, i being the row's index in the *global* diffusion batch; ranks take interleaved rows, so
    that each sees the whole range of times (and masks, and work).
    """
    offset = uniforms(words(1, *key, "time"))[0]
    t = ((offset + indices) / count) % 1.0
    return epsilon + (1 - epsilon) * t
