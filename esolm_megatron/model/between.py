"""What lies between the products of a block: norms, heads and rotation, activation, residual and dropout.

Each is a function of tensors alone, the weights among them, so it does not matter who multiplies before and after it, and
one compiled form serves all blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esolm_megatron.model.kernels import sampling_kernels
from esolm_megatron.model.rotary import rotate


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """x normalised over its last dimension, same shape and dtype; statistics are taken in fp32 or better."""
    if kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def heads(
    y: Tensor, rope: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor] | None, sizes: tuple[int, int, int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The product (T, 1, rows) as rotated queries (T, N, D), rotated keys and values (T, G, D).

    norms: weights of the RMSNorm of queries and of keys. sizes: G, queries of each, D; rows are grouped so, see `Attention`.
    """
    groups, queries, width = sizes
    kernels = sampling_kernels(y)
    if kernels is not None:
        return kernels.rotated(y, rope, norms, sizes, eps)
    y = y.view(y.shape[0], groups, queries + 2, width)
    q, k, v = y.split([queries, 1, 1], dim=2)  # one concatenation in backward
    if norms is not None:
        # before heads are flattened, which copies queries that share a key: backward keeps what comes here
        q, k = (normalise(x, weight, None, eps, "rmsnorm") for x, weight in zip((q, k), norms, strict=True))
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    return rotate(q, rope), rotate(k, rope), v


def activate(y: Tensor, gated: bool) -> Tensor:
    """GELU-tanh; with SwiGLU the first half of the channels gates the second."""
    if not gated:
        return F.gelu(y, approximate="tanh")
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def add(x: Tensor, delta: Tensor, ids: Tensor | None, salt: Tensor | None, p: float) -> Tensor:
    """The residual stream with what a branch adds, some of its channels dropped where there are ids."""
    return x + (delta if ids is None or salt is None else hashed_dropout(delta, ids, salt, p))


def hashed_dropout(x: Tensor, ids: Tensor, salt: Tensor | int, p: float) -> Tensor:
    """x with each channel dropped with probability p, decided by (token id, channel, salt) alone.

    No generator is read: the mask is the same in a recomputed forward pass, on every tensor, sequence and pipeline
    split, and in a resumed run. x (T', 1, H); ids (T',) int32, different for each token of a step; salt: int32.
    """
    if p == 0:
        return x
    channel = torch.arange(x.shape[-1], device=x.device, dtype=torch.int32)
    h = ids[:, None] * -1640531535 + channel[None] * 97 + salt * 7919
    for multiplier in (-2048144789, -1028477387):  # murmur3's finaliser; shifts of int32 keep the sign, hence the masks
        h = (h ^ ((h >> 16) & 0xFFFF)) * multiplier
        h = h ^ ((h >> 13) & 0x7FFFF)
    keep = (h & 0x7FFFFFFF) >= int(p * 2**31)
    return x * (keep[:, None, :].to(x.dtype) / (1 - p))


@dataclass(frozen=True)
class Between:
    """The functions that a block calls."""

    normalise: Callable[..., Tensor] = normalise
    heads: Callable[..., tuple[Tensor, Tensor, Tensor]] = heads
    activate: Callable[..., Tensor] = activate
    add: Callable[..., Tensor] = add
    drop: Callable[..., Tensor] = hashed_dropout


EAGER = Between()


def compiled(**options: Any) -> Between:
    """The same, compiled; with equal options it is one set for the whole process."""
    return _compiled(tuple(sorted(options.items())))


@cache
def _compiled(options: tuple[tuple[str, Any], ...]) -> Between:
    return Between(
        *(torch.compile(f, fullgraph=True, **dict(options)) for f in (normalise, heads, activate, add, hashed_dropout))
    )
