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

Where attention stays inside documents, each row's places are grouped by document, in the order within each. Then every
document is a short row of its own, with a share of the mask stream that holds the last places of *its* order: the same two
calls, on runs of tokens of varying length, laid end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from esolm_megatron.model.kernels import Runs, flash_backward, flash_forward, for_keys, for_queries, laid_out_as


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


@dataclass(frozen=True)
class Part:
    """One call of a flash kernel: which queries attend to which keys, as indices along the tokens."""

    queries: slice | Tensor
    keys: slice | Tensor
    causal: bool
    runs: Runs | None = None


def with_tensors(value: Any, how: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass (or tuple of them) with `how` of each tensor in it, at any depth, in the tensor's place."""
    if isinstance(value, Tensor):
        return how(value)
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        return tuple(with_tensors(x, how) for x in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{name: with_tensors(x, how) for name, x in vars(value).items()})
    return value


def mask_parts(
    query: NDArray[np.int64], queries: NDArray[np.int64], key: NDArray[np.int64], keys: NDArray[np.int64]
) -> tuple[Part, ...]:
    """The calls for runs of masks that hold the last places of runs of clean tokens; a run may have no masks.

    query, key: where each run of masks, and its clean tokens, start. queries, keys: how many there are of both.
    """
    first = keys - queries
    past, recent = (queries > 0) & (first > 0), queries > 1
    out = []
    if past.any():
        out.append(_ragged(query[past], queries[past], key[past], first[past], causal=False))
    if recent.any():
        rest = queries[recent] - 1
        out.append(_ragged(query[recent] + 1, rest, (key + first)[recent], rest, causal=True))
    return tuple(out)


@dataclass(frozen=True)
class DocumentRuns:
    """How documents cut a micro-batch: its causal rows, and the calls of its mask streams (all groups of them at once)."""

    causal: Runs
    masks: tuple[Part, ...]

    @classmethod
    def of(cls, causal: Sequence[NDArray[np.int64]], masks: Sequence[NDArray[np.int64]]) -> DocumentRuns:
        """From the number of tokens that each row has of each of its documents; 0 is allowed.

        causal: (rows, documents) of the plain rows, if any, and of each group's clean streams. masks: of each group's
        mask streams, with the documents of its clean streams.
        """
        sizes = np.concatenate([x.ravel() for x in causal])
        whole = Runs.of(sizes[sizes > 0], sizes[sizes > 0])
        if not masks:
            return cls(whole, ())
        n = np.concatenate([x.ravel() for x in causal[len(causal) - len(masks) :]])
        m = np.concatenate([x.ravel() for x in masks])
        return cls(whole, mask_parts(np.cumsum(m) - m, m, np.cumsum(n) - n, n))


def _ragged(
    query: NDArray[np.int64],
    queries: NDArray[np.int64],
    key: NDArray[np.int64],
    keys: NDArray[np.int64],
    *,
    causal: bool,
) -> Part:
    """The part whose runs start at `query` and `key` and have so many `queries` and `keys`."""
    from_query, from_key = (
        torch.from_numpy(np.repeat(first - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum()))
        for first, sizes in ((query, queries), (key, keys))
    )
    return Part(from_query, from_key, causal, Runs.of(queries, keys))


@dataclass(frozen=True)
class Stream:
    """Mask streams of `rows` rows of equal length: which packed tokens they are, which their clean ones, and their calls."""

    masks: slice
    clean: slice
    rows: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Calls:
    """All that attention does for a layout: the first `causal` packed tokens as `rows` causal rows (of `runs`), and streams."""

    causal: slice
    rows: int
    runs: Runs | None
    streams: tuple[Stream, ...]

    @classmethod
    def of(cls, layout: PackedLayout, documents: DocumentRuns | None) -> Calls:
        """With documents, all causal rows are one that is cut into runs, and so are all mask streams."""
        length, count = layout.seq_length, layout.num_causal_rows
        causal = slice(0, count * length)
        if documents is not None:
            clean = slice(layout.num_plain * length, causal.stop)
            streams = (Stream(slice(causal.stop, layout.num_tokens), clean, 1, documents.masks),)
            return cls(causal, 1, documents.causal, streams if layout.groups else ())
        found, at, row = [], causal.stop, layout.num_plain
        for rows, capacity in layout.groups:
            masks, clean = slice(at, at + rows * capacity), slice(row * length, (row + rows) * length)
            found.append(Stream(masks, clean, rows, _parts(capacity, length)))
            at, row = masks.stop, row + rows
        return cls(causal, count, None, tuple(found))


class PackedAttention:
    """The `attend` argument of the network for one layout; inside documents only, where `documents` says how they lie."""

    def __init__(self, layout: PackedLayout, documents: DocumentRuns | None = None):
        self.calls = Calls.of(layout, documents)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, N, D), k and v (T, G, D) -> (T, N, D)."""
        return _Packed.apply(q, k, v, self.calls)


class _Packed(torch.autograd.Function):
    """One node for a whole packed row: autograd would make and add up a padded gradient for every slice of it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: Calls) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1])
        q_row, k_row, v_row = (_by_row(x, calls.causal, calls.rows) for x in (q, k, v))
        out, lse = flash_forward(q_row, k_row, v_row, True, scale, calls.runs)
        pieces, kept = [_flat(out)], [lse]
        for stream in calls.streams:
            merged, *sums = _mask_stream_forward(_of_stream(stream, q, k, v), stream.parts)
            pieces.append(_flat(merged).to(q.dtype))
            kept += sums
        whole = _joined(pieces)
        ctx.save_for_backward(q, k, v, whole, *kept)
        ctx.calls = calls
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *sums = ctx.saved_tensors
        calls, grad, scale = ctx.calls, laid_out_as(grad, out), 1 / math.sqrt(q.shape[-1])
        g, q_row, k_row, v_row, o = (_by_row(x, calls.causal, calls.rows) for x in (grad, q, k, v, out))
        pieces = [[_flat(x)] for x in flash_backward(g, q_row, k_row, v_row, o, lse, True, scale, calls.runs)]
        for number, stream in enumerate(calls.streams):
            g, o = (_by_row(x, stream.masks, stream.rows) for x in (grad, out))
            total, p_self = sums[2 * number : 2 * number + 2]
            *own, dk, dv = _mask_stream_backward(g, _of_stream(stream, q, k, v), o, total, p_self, stream.parts)
            for piece, more in zip(pieces[1:], (dk, dv), strict=True):
                piece[0][stream.clean] += _flat(more)
            for piece, more in zip(pieces, own, strict=True):
                piece.append(_flat(more))
        return *(_joined(piece) for piece in pieces), None


def _of_stream(stream: Stream, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values of the masks, keys and values of the clean tokens."""
    masks = [_by_row(x, stream.masks, stream.rows) for x in (q, k, v)]
    return masks + [_by_row(x, stream.clean, stream.rows) for x in (k, v)]


def _by_row(x: Tensor, which: slice, rows: int) -> Tensor:
    """(T, N, D) -> (rows, N, tokens of a row, D) of some tokens; a view."""
    return x[which].unflatten(0, (rows, -1)).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """(rows, N, tokens of a row, D) -> (T, N, D)."""
    return x.transpose(1, 2).flatten(0, 1)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention under a causal mask. q (B, N, L, D); k, v (B, G, L, D) -> (B, N, L, D)."""
    return F.scaled_dot_product_attention(q, for_queries(k, q), for_queries(v, q), is_causal=True)


def mask_stream_attention(q: Tensor, k_self: Tensor, v_self: Tensor, k_clean: Tensor, v_clean: Tensor) -> Tensor:
    """Each mask attends to the clean keys strictly before its place and to its own key.

    q (B, N, C, D): the last C places of the order. k_self, v_self (B, G, C, D). k_clean, v_clean (B, G, L, D), C <= L.
    Returns (B, N, C, D).
    """
    return mask_stream_of_parts(q, k_self, v_self, k_clean, v_clean, parts=_parts(q.shape[2], k_clean.shape[2]))


def mask_stream_of_parts(
    q: Tensor, k_self: Tensor, v_self: Tensor, k_clean: Tensor, v_clean: Tensor, *, parts: tuple[Part, ...]
) -> Tensor:
    """The same where `parts` say which clean keys each mask sees besides its own."""
    return _MaskStream.apply(q, k_self, v_self, k_clean, v_clean, parts)


def _parts(capacity: int, length: int) -> tuple[Part, ...]:
    first = length - capacity
    past = [Part(slice(0, None), slice(0, first), causal=False)] if first else []
    recent = [Part(slice(1, None), slice(first, length - 1), causal=True)] if capacity > 1 else []
    return (*past, *recent)


class _MaskStream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k_self: Tensor, v_self: Tensor, k_clean: Tensor, v_clean: Tensor, parts: tuple[Part, ...]
    ) -> Tensor:
        inputs = (q, k_self, v_self, k_clean, v_clean)
        merged, *sums = _mask_stream_forward(inputs, parts)
        merged = merged.to(q.dtype)
        ctx.save_for_backward(*inputs, merged, *sums)
        ctx.parts = parts
        return merged

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, merged, total, p_self = ctx.saved_tensors
        return *_mask_stream_backward(laid_out_as(grad, merged), inputs, merged, total, p_self, ctx.parts), None


def _mask_stream_forward(inputs: Sequence[Tensor], parts: tuple[Part, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The output in fp32 or better, and (B, N, C): its log-sum-exp, and the weight of the own key.

    inputs: as `mask_stream_attention` has them.
    """
    q, k_self, v_self, k_clean, v_clean = inputs
    scale = 1 / math.sqrt(q.shape[-1])
    score = (q * for_queries(k_self, q)).sum(-1, dtype=_wide(q)) * scale
    total, pieces = score.clone(), []
    for part in parts:
        out, lse = flash_forward(
            q[:, :, part.queries], k_clean[:, :, part.keys], v_clean[:, :, part.keys], part.causal, scale, part.runs
        )
        pieces.append((part.queries, out, lse))
        total[:, :, part.queries] = torch.logaddexp(total[:, :, part.queries], lse)
    p_self = torch.exp(score - total)
    merged = p_self[..., None] * for_queries(v_self, q)
    for queries, out, lse in pieces:
        share = torch.exp(lse - total[:, :, queries])[..., None]
        if isinstance(queries, slice):
            merged[:, :, queries].addcmul_(share, out.to(merged.dtype))
        else:
            merged[:, :, queries] += share * out
    return merged, total, p_self


def _mask_stream_backward(
    grad: Tensor, inputs: Sequence[Tensor], merged: Tensor, total: Tensor, p_self: Tensor, parts: tuple[Part, ...]
) -> tuple[Tensor, ...]:
    """Gradients of the inputs of `_mask_stream_forward`."""
    q, k_self, v_self, k_clean, v_clean = inputs
    scale, wide = 1 / math.sqrt(q.shape[-1]), _wide(q)
    delta = (grad.to(wide) * (for_queries(v_self, q).to(wide) - merged.to(wide))).sum(-1)
    d_score = (p_self * delta * scale)[..., None]
    dq = d_score * for_queries(k_self, q)
    dk, dv = torch.zeros_like(k_clean), torch.zeros_like(v_clean)
    for part in parts:
        queries, keys = part.queries, part.keys
        gq, gk, gv = flash_backward(
            grad[:, :, queries],
            q[:, :, queries],
            k_clean[:, :, keys],
            v_clean[:, :, keys],
            merged[:, :, queries],
            total[:, :, queries],
            part.causal,
            scale,
            part.runs,
        )
        dq[:, :, queries] += gq
        dk[:, :, keys] += gk
        dv[:, :, keys] += gv
    own = for_keys((d_score * q).to(q.dtype), k_self), for_keys((p_self[..., None] * grad).to(q.dtype), v_self)
    return dq.to(q.dtype), *own, dk, dv


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
