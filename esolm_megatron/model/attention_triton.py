"""Attention over the KV cache as Triton kernels, for rows whose lengths are data on the device, not shapes.

A program takes some queries of a row, those that share a key side by side, and a share of the keys that they see: few long
rows are split over keys, so that they fill a GPU too, and a second kernel merges the shares by their log-sum-exp. What a
query sees are three numbers, so causality, padding and groups of verified proposals need no mask in memory. Under
TRITON_INTERPRET=1 both run on CPU tensors, which is how they are tested where there is no GPU.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_K = 64
PROGRAMS = 264
"""Programs of a call that fill a GPU: two for each processor of an H200."""


@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    if EXACT:  # the interpreter multiplies the bits of bf16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["width", "splits", "pages"])
def _attend(
    q, keys, values, scales, rows, seen, out, lse, scales_stride, row_stride, group_stride, slot_stride, width, splits, pages,
    scale, QUERIES: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr, INT8: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width * QUERIES, BLOCK_Q)
    row, group, share = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, d = row * width + m // QUERIES, tl.arange(0, WIDE)
    inside = m < width * QUERIES
    slot = tl.load(seen + 3 * token, mask=inside, other=-1)[:, None]
    limit = tl.load(seen + 3 * token + 1, mask=inside, other=0)[:, None]
    first = tl.load(seen + 3 * token + 2, mask=inside, other=0)[:, None]
    head = token.to(tl.int64) * tl.num_programs(1) * QUERIES + group * QUERIES + m % QUERIES
    at = head[:, None] * HEAD + d[None]
    held = inside[:, None] & (d < HEAD)[None]
    x = tl.load(q + at, mask=held, other=0.0)
    base = group.to(tl.int64) * group_stride
    if PAGE == 0:
        base += tl.load(rows + row).to(tl.int64) * row_stride
    length = tl.max(tl.max(slot, 1), 0) + 1
    each = tl.cdiv(tl.cdiv(length, splits), BLOCK_K) * BLOCK_K
    stop = tl.minimum((share + 1) * each, length)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, WIDE], tl.float32)
    for start in range(share * each, stop, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        here, slot_of = base, key
        if PAGE > 0:
            here += tl.load(rows + row * pages + start // PAGE).to(tl.int64) * row_stride
            slot_of = key % PAGE
        where = here + slot_of[:, None].to(tl.int64) * slot_stride + d[None]
        there = (key < stop)[:, None] & (d < HEAD)[None]
        k = tl.load(keys + where, mask=there, other=0.0)
        if INT8:  # whole numbers that every type holds; through fp32, for the interpreter
            k = k.to(tl.float32)
        scores = _product(x, tl.trans(k.to(x.dtype)), EXACT) * scale
        if INT8:
            kept = scales + here // HEAD + slot_of * (slot_stride // HEAD)
            scores *= tl.load(kept, mask=key < stop, other=0.0)[None]
        own = (key[None] <= slot) & ((key[None] < limit) | (key[None] >= first))
        scores = tl.where(own, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(values + where, mask=there, other=0.0)
        if INT8:
            p *= tl.load(kept + scales_stride, mask=key < stop, other=0.0)[None]
            v = v.to(tl.float32)
        mixed = mixed * shrink[:, None] + _product(p.to(x.dtype), v.to(x.dtype), EXACT)
        top = higher
    total = tl.where(total > 0, total, 1.0)  # where nothing is seen `top` stays minus infinity
    mixed = mixed / total[:, None]
    head = head * splits + share
    tl.store(lse + head, top + tl.log2(total), mask=inside)
    tl.store(out + head[:, None] * HEAD + d[None], mixed.to(out.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["splits"])
def _merge(parts, lse, out, splits, HEAD: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    head, share, d = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, WIDE)
    sums = tl.load(lse + head * splits + share, mask=share < splits, other=float("-inf"))
    top = tl.max(sums, 0)
    weight = tl.exp2(sums - tl.where(top == float("-inf"), 0.0, top))
    there = (share < splits)[:, None] & (d < HEAD)[None]
    part = tl.load(parts + (head * splits + share)[:, None] * HEAD + d[None], mask=there, other=0.0)
    total = tl.sum(weight, 0)
    mixed = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + head * HEAD + d, mixed.to(out.dtype.element_ty), mask=d < HEAD)


def attend(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, seen: Tensor, scales: Tensor | None = None) -> Tensor:
    """What queries find in the cache: (R W, N, D), of R rows with W queries each; 0 where one sees nothing.

    q: (R W, N, D), contiguous. keys, values: (rows of the cache, G, slots, D), laid out alike. rows: (R,) int64, each row's
    one in the cache; or (R, P) its pages there, one behind the other. seen: (R W, 3) int32, (slot, limit, first): the keys up
    to `slot`, without those from `limit` on that lie before `first`; slot -1 sees none. All lengths are read on the device.
    scales: (2, rows of the cache, G, slots) fp32, what keys and values of 8 bits are multiplied by; those of keys lie as they do.
    """
    tokens, heads, head_dim = q.shape
    groups, page = keys.shape[1:3]
    pages = rows.shape[1] if rows.dim() == 2 else 0
    rows, slots = rows.contiguous(), page * max(pages, 1)
    queries, width = heads // groups, tokens // len(rows)
    block = min(max(triton.next_power_of_2(width * queries), 16), 64)
    programs = len(rows) * triton.cdiv(width * queries, block) * groups
    splits = max(1, min(PROGRAMS // programs, triton.cdiv(slots, BLOCK_K), 64))
    wide = max(16, triton.next_power_of_2(head_dim))
    out = torch.empty_like(q)
    parts = out if splits == 1 else torch.empty(tokens * heads * splits, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(tokens * heads * splits, dtype=torch.float32, device=q.device)
    _attend[(programs // groups, groups, splits)](
        q, keys, values, q if scales is None else scales, rows, seen, parts, lse, 0 if scales is None else scales.stride(0),
        *keys.stride()[:3], width, splits, pages, head_dim**-0.5 * 1.4426950408889634,
        QUERIES=queries, HEAD=head_dim, WIDE=wide, BLOCK_Q=block, BLOCK_K=BLOCK_K,
        EXACT=not isinstance(_attend, triton.JITFunction), INT8=scales is not None, PAGE=page if pages else 0, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _merge[(tokens * heads,)](
            parts, lse, out, splits, HEAD=head_dim, WIDE=wide, SPLITS=triton.next_power_of_2(splits), num_warps=4
        )
    return out
