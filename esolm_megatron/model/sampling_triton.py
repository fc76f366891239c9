"""What lies between a block's products and its attention in a pass of sampling, as Triton kernels of a launch each.

Piece by piece it is a dozen launches a block, of a few microseconds each whatever the batch, in a pass that a GPU could do in
less. `rotated` makes queries and keys: norm of each head, and rotation. `store` writes keys and values into the cache, in 8 bits
with a scale if that has them. `added` is the residual stream after a branch, and its norm. No gradients. Under TRITON_INTERPRET=1
they run on CPU tensors, which is how they are tested where there is no GPU.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUND = tl.constexpr(12582912.0)
"""1.5 x 2^23: added and taken away again, it rounds fp32 numbers below 2^22 to whole ones, halves to even as torch does."""


@triton.jit
def _rotate(
    y, cos, sin, q_weight, k_weight, q, k, eps, token_stride, GROUPS: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr,
    WIDE: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token, h = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, WIDE)
    group, i = h // (QUERIES + 1), h % (QUERIES + 1)
    inside = (h < GROUPS * (QUERIES + 1))[:, None] & (d < HALF)[None]
    at = token * token_stride + ((group * (QUERIES + 2) + i) * 2 * HALF)[:, None] + d[None]
    a = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(y + at + HALF, mask=inside, other=0.0).to(tl.float32)
    is_query = (i < QUERIES)[:, None]
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        there = (d < HALF)[None]
        for_a = tl.where(
            is_query,
            tl.load(q_weight + d[None], mask=there, other=0.0),
            tl.load(k_weight + d[None], mask=there, other=0.0),
        )
        for_b = tl.where(is_query, tl.load(q_weight + HALF + d[None], mask=there, other=0.0),
                         tl.load(k_weight + HALF + d[None], mask=there, other=0.0))  # fmt: skip
        a, b = a * scale * for_a.to(tl.float32), b * scale * for_b.to(tl.float32)
    c = tl.load(cos + token * 2 * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None]
    s = tl.load(sin + token * 2 * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None]
    first, second = (a * c - b * s).to(q.dtype.element_ty), (b * c + a * s).to(q.dtype.element_ty)
    to_q = ((token * GROUPS * QUERIES + group * QUERIES + i) * 2 * HALF)[:, None] + d[None]
    to_k = ((token * GROUPS + group) * 2 * HALF)[:, None] + d[None]
    tl.store(q + to_q, first, mask=inside & is_query)
    tl.store(q + to_q + HALF, second, mask=inside & is_query)
    tl.store(k + to_k, first, mask=inside & (i == QUERIES)[:, None])
    tl.store(k + to_k + HALF, second, mask=inside & (i == QUERIES)[:, None])


def rotated(
    y: Tensor, rope: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor] | None, sizes: tuple[int, int, int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `between.heads`: the product (T, 1, rows), contiguous, as rotated queries, rotated keys and values (a view)."""
    assert y.is_contiguous()
    rope = rope[0].contiguous(), rope[1].contiguous()
    groups, queries, width = sizes
    tokens, count = len(y), groups * (queries + 1)
    q, k = (torch.empty(tokens, heads, width, dtype=y.dtype, device=y.device) for heads in (groups * queries, groups))
    each = min(triton.next_power_of_2(count), max(1, 4096 // triton.next_power_of_2(width)))
    q_weight, k_weight = (y, y) if norms is None else norms
    _rotate[(tokens, triton.cdiv(count, each))](
        y, *rope, q_weight, k_weight, q, k, eps, y.stride(0), GROUPS=groups, QUERIES=queries, HALF=width // 2,
        WIDE=triton.next_power_of_2(width // 2), HEADS=each, NORM=norms is not None, num_warps=4,
    )  # fmt: skip
    return q, k, y.view(tokens, groups, queries + 2, width)[:, :, -1]


@triton.jit
def _kept(x, source, cache, scales, inside, at, scale_at, INT8: tl.constexpr):
    values = tl.load(x + source, mask=inside, other=0.0)
    if INT8:
        wide = values.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(wide), 1) / 127, 1.1754943508222875e-38)
        tl.store(scales + scale_at, scale, mask=tl.max(inside.to(tl.int32), 1) > 0)
        values = ((tl.div_rn(wide, scale[:, None]) + ROUND) - ROUND).to(tl.int8)
    tl.store(cache + at, values, mask=inside)


@triton.jit
def _store(
    k, v, keys, values, scales, rows, slots, k_token, k_group, v_token, v_group, row_stride, group_stride, slot_stride,
    scales_stride, HEAD: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    token, g, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, WIDE)
    inside = (g < GROUPS)[:, None] & (d < HEAD)[None]
    place = tl.load(rows + token) * row_stride + tl.load(slots + token) * slot_stride + g * group_stride
    at, scale_at = place[:, None] + d[None], place // HEAD
    _kept(k, token * k_token + (g * k_group)[:, None] + d[None], keys, scales, inside, at, scale_at, INT8)
    _kept(
        v,
        token * v_token + (g * v_group)[:, None] + d[None],
        values,
        scales + scales_stride,
        inside,
        at,
        scale_at,
        INT8,
    )


def store(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scales: Tensor | None, rows: Tensor, slots: Tensor
) -> None:
    """Write k and v (T, G, D) of a layer to `rows` and `slots` (T,) int64 of its cache, laid out as `KVCache` has it."""
    (tokens, groups, width), rows, slots = k.shape, rows.contiguous(), slots.contiguous()  # one row's are expanded
    _store[(tokens,)](
        k, v, keys, values, k if scales is None else scales, rows, slots, *k.stride()[:2], *v.stride()[:2],
        *keys.stride()[:3], 0 if scales is None else scales.stride(0), HEAD=width, WIDE=triton.next_power_of_2(width),
        GROUPS=groups, BLOCK=triton.next_power_of_2(groups), INT8=scales is not None, num_warps=4,
    )  # fmt: skip


@triton.jit
def _add_normalise(x, delta, weight, bias, total, out, eps, H, BLOCK: tl.constexpr, CENTRED: tl.constexpr):
    token, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at = d < H, token * H + d
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(delta + at, mask=inside, other=0.0).to(
        tl.float32
    )
    narrow = a.to(total.dtype.element_ty)
    tl.store(total + at, narrow, mask=inside)
    a = narrow.to(tl.float32)
    if CENTRED:
        a = tl.where(inside, a - tl.sum(a, 0) / H, 0.0)
    y = a * tl.rsqrt(tl.sum(a * a, 0) / H + eps) * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        y += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def added(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta (T, 1, H), and its LayerNorm, or RMSNorm without a bias."""
    x, delta = x.contiguous(), delta.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _add_normalise[(len(x),)](
        x, delta, weight, weight if bias is None else bias, total, out, eps, x.shape[-1],
        BLOCK=triton.next_power_of_2(x.shape[-1]), CENTRED=bias is not None, num_warps=8,
    )  # fmt: skip
    return total, out
