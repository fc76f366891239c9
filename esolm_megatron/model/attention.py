"""Attention over packed streams: causal over the generation order, without any dense mask.

A micro-batch is one row of tokens. `plain` rows are fed once, in their order, under causal attention (the diffusion
part). Two-stream rows are fed twice: a clean stream of all L true tokens in their order, and a mask stream that holds
the last `capacity` places of the order. A mask sees the true tokens strictly before its place, and itself:

    order   3 1 2 4      clean stream x        mask stream z, capacity 3
                         x3 x1 x2 x4
      x3                 1
      x1                 1  1
      x2                 1  1  1
      x4                 1  1  1  1
      z1                 1                     1 (its own key)
      z2                 1  1                     1
      z4                 1  1  1                     1

So the clean rows are one plain causal call. A mask stream needs the `past` keys that all its places see (here x3; one
full call), the `recent` keys (here x1 x2; one causal call, shifted by one place), and its own key: three softmaxes over
parts of a row, merged by log-sum-exp. In backward each part is the library's own flash backward, fed the *merged* output
and log-sum-exp (the identity that ring attention uses), and elementwise terms for the own key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class PackedLayout:
    """What the tokens of a micro-batch are: plain rows, then clean streams of each group, then mask streams of each.

    groups: (rows, capacity) of two-stream rows.
    """

    seq_length: int
    num_plain: int
    groups: tuple[tuple[int, int], ...] = ()

    @property
    def num_causal_rows(self) -> int:
        """Rows of seq_length tokens under causal attention: plain ones and clean streams."""
        return self.num_plain + sum(rows for rows, _ in self.groups)

    @property
    def num_tokens(self) -> int:
        """Tokens in the packed row."""
        return self.num_causal_rows * self.seq_length + sum(rows * capacity for rows, capacity in self.groups)


class PackedAttention:
    """The `attend` argument of the network for one layout."""

    def __init__(self, layout: PackedLayout):
        self.layout = layout

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, N, D), k and v (T, G, D) -> (T, N, D)."""
        length, count = self.layout.seq_length, self.layout.num_causal_rows
        causal = count * length
        rows = [x[:causal].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        parts = [causal_attention(*rows).transpose(1, 2).reshape(causal, *q.shape[1:])]
        row, token = self.layout.num_plain, causal
        for group_rows, capacity in self.layout.groups:
            end = token + group_rows * capacity
            masks = [x[token:end].view(group_rows, capacity, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
            clean = [x[row : row + group_rows] for x in rows[1:]]
            out = mask_stream_attention(*masks, *clean)
            parts.append(out.transpose(1, 2).reshape(end - token, *q.shape[1:]))
            row, token = row + group_rows, end
        return torch.cat(parts)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention under a causal mask. q (B, N, L, D); k, v (B, G, L, D) -> (B, N, L, D)."""
    k, v = _shared_heads(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _shared_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values repeated for the queries that share them (the kernels here want equal head counts)."""
    times = q.shape[1] // k.shape[1]
    if times == 1:
        return k, v
    return k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)


def mask_stream_attention(q: Tensor, k_self: Tensor, v_self: Tensor, k_clean: Tensor, v_clean: Tensor) -> Tensor:
    """Each mask attends to the clean keys strictly before its place and to its own key.

    q (B, N, C, D): the last C places of the order. k_self, v_self (B, G, C, D). k_clean, v_clean (B, G, L, D), C <= L.
    Returns (B, N, C, D).
    """
    k_self, v_self = _shared_heads(q, k_self, v_self)
    k_clean, v_clean = _shared_heads(q, k_clean, v_clean)
    return _MaskStream.apply(q, k_self, v_self, k_clean, v_clean)


@dataclass(frozen=True)
class _Part:
    """Queries from `query` on, keys in [key, key_end)."""

    query: int
    key: int
    key_end: int
    causal: bool


def _parts(capacity: int, length: int) -> list[_Part]:
    first = length - capacity
    past = [_Part(0, 0, first, causal=False)] if first else []
    recent = [_Part(1, first, length - 1, causal=True)] if capacity > 1 else []
    return past + recent


class _MaskStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k_self: Tensor, v_self: Tensor, k_clean: Tensor, v_clean: Tensor) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1])
        score = (q * k_self).sum(-1, dtype=_wide(q)) * scale
        total, pieces = score, []
        for part in _parts(q.shape[2], k_clean.shape[2]):
            keys = slice(part.key, part.key_end)
            out, lse = flash_forward(
                q[:, :, part.query :], k_clean[:, :, keys], v_clean[:, :, keys], part.causal, scale
            )
            pieces.append((part.query, out, lse))
            seen = torch.logaddexp(total[:, :, part.query :], lse)
            total = torch.cat([total[:, :, : part.query], seen], dim=2) if part.query else seen
        p_self = torch.exp(score - total)
        merged = p_self[..., None] * v_self
        for query, out, lse in pieces:
            merged[:, :, query:] += torch.exp(lse - total[:, :, query:])[..., None] * out
        merged = merged.to(q.dtype)
        ctx.save_for_backward(q, k_self, v_self, k_clean, v_clean, merged, total, p_self)
        return merged

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k_self, v_self, k_clean, v_clean, merged, total, p_self = ctx.saved_tensors
        scale, grad = 1 / math.sqrt(q.shape[-1]), grad.contiguous()
        wide = _wide(q)
        delta = (grad.to(wide) * (v_self.to(wide) - merged.to(wide))).sum(-1)
        d_score = (p_self * delta * scale)[..., None]
        dq = d_score * k_self
        dk, dv = torch.zeros_like(k_clean), torch.zeros_like(v_clean)
        for part in _parts(q.shape[2], k_clean.shape[2]):
            keys, from_query = slice(part.key, part.key_end), slice(part.query, None)
            gq, gk, gv = flash_backward(
                grad[:, :, from_query],
                q[:, :, from_query],
                k_clean[:, :, keys],
                v_clean[:, :, keys],
                merged[:, :, from_query],
                total[:, :, from_query],
                part.causal,
                scale,
            )
            dq[:, :, from_query] += gq
            dk[:, :, keys] += gk
            dv[:, :, keys] += gv
        return dq.to(q.dtype), (d_score * q).to(q.dtype), (p_self[..., None] * grad).to(q.dtype), dk, dv


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and its natural log-sum-exp, from the device's flash kernel.

    q (B, N, Q, D); k, v (B, N, K, D); causal only with Q = K. Returns (B, N, Q, D) and (B, N, Q) in fp32 (fp64 for
    fp64). CUDA kernels exist for bf16 and fp16; wider types on a GPU take the plain computation.
    """
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if q.dtype not in (torch.bfloat16, torch.float16):
        weights, lse = _dense_weights(q, k, causal, scale)
        return weights @ v, lse
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through the keys given here, where `out` and `lse` may come from more keys than these."""
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.contiguous(), 0.0, causal, scale=scale
        )
    if q.dtype not in (torch.bfloat16, torch.float16):
        scores = _dense_scores(q, k, causal, scale)
        weights = torch.exp(scores - lse[..., None])
        d_scores = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
        return d_scores @ k, d_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad
    none = torch.empty(0, dtype=torch.int32, device=q.device)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout's generator state, unread at dropout 0
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out.contiguous(), lse.contiguous(), none, none, q.shape[2], k.shape[2], 0.0, causal, state, state,
        scale=scale,
    )  # fmt: skip


def _dense_scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * scale
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    return scores


def _dense_weights(q: Tensor, k: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores = _dense_scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]), lse
