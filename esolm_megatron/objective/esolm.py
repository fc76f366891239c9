"""The Eso-LM training loss: tokens to packed inputs and targets, token losses to the loss (arXiv 2506.01928, section 3).

Two steps. `draw_*` decides, for each row, its order, its masks and what each masked token counts. `pack` lays rows out
as one static row of tokens (see model/attention.py). Both are pure; draws are keyed by (seed, step, global row).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esolm_megatron.config import Config, ObjectiveConfig
from esolm_megatron.model.attention import DocumentRuns, PackedAttention, PackedLayout, with_tensors
from esolm_megatron.model.last_block import LastBlock
from esolm_megatron.objective.noise import antithetic_times, elbo_weight, uniforms, words
from esolm_megatron.objective.order import clean_random_then_left_to_right, clean_then_masked_random

_Rows = tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64] | None]
"""Tokens (B, L), valid (B, L), rows (B,), documents (B, L)."""
_Key = tuple[int | str, ...]
DIFFUSION, SEQUENTIAL = 0, 1
"""The two parts of the loss, and their places in the arrays that hold something for both."""


@dataclass(frozen=True)
class OrderedRows:
    """Rows whose noise is drawn. All arrays are (B, L) over sequence positions, `order` excepted.

    tokens: true ids. order: position generated k-th. masked: fed as masks. weights: what -log p of a token counts; 0
    where it carries no loss. rows: (B,) global row in the batch, or any id that tells rows apart. documents: number of the
    document that each position belongs to, from 0, where a token sees only its own; None where it sees the whole row.
    """

    tokens: NDArray[np.int64]
    order: NDArray[np.int64]
    masked: NDArray[np.bool_]
    weights: NDArray[np.float64]
    rows: NDArray[np.int64]
    documents: NDArray[np.int64] | None = None

    def __getitem__(self, which: slice) -> OrderedRows:
        """Some of the rows."""
        documents = None if self.documents is None else self.documents[which]
        return OrderedRows(
            self.tokens[which], self.order[which], self.masked[which], self.weights[which], self.rows[which], documents
        )

    def stream(self, first_place: int) -> NDArray[np.int64]:
        """Positions in the order in which they are fed: places from `first_place` on, each document's together."""
        order = self.order[:, first_place:]
        if self.documents is None:
            return order
        return np.take_along_axis(order, np.argsort(self._in_order(order), axis=1, kind="stable"), axis=1)

    def document_sizes(self, first_place: int) -> NDArray[np.int64]:
        """How many of these places each document has: (B, documents)."""
        assert self.documents is not None
        count = int(self.documents.max(initial=-1)) + 1
        found = self._in_order(self.order[:, first_place:]) + np.arange(len(self.order))[:, None] * count
        return np.bincount(found.ravel(), minlength=len(self.order) * count).reshape(-1, count)

    def _in_order(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self.documents is not None
        return np.take_along_axis(self.documents, order, axis=1)


def document_numbers(starts: Sequence[NDArray[np.int64]], valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number of the document that each position belongs to, from 0: (B, L). Padding is one more, seen by nobody else.

    starts: for each row, where inside it documents start (place 0 is left out, or not). valid: (B, L).
    """
    numbers = np.zeros(valid.shape, np.int64)
    for row, places in zip(numbers, starts, strict=True):
        row[places[places > 0]] = 1
    numbers = numbers.cumsum(axis=1)
    return np.where(valid, numbers, numbers[:, -1:] + 1)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch as the network takes it.

    tokens, positions: (T,) int64. places: (M,) int64, the tokens that carry loss; targets (M,) their true ids; weights
    (M,) fp64 what each counts; parts (M,) DIFFUSION or SEQUENTIAL; sources (M,) which of the micro-batch's rows it
    belongs to, plain rows first. dropout_ids: (T,) int32. documents: where they lie, if attention stays inside them.
    last: what the last block computes.
    """

    layout: PackedLayout
    tokens: Tensor
    positions: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor
    parts: Tensor
    sources: Tensor
    dropout_ids: Tensor
    last: LastBlock
    documents: DocumentRuns | None = None

    def to(self, device: torch.device) -> PackedBatch:
        """The same on a device."""
        return with_tensors(self, lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> PackedBatch:
        """The same in page-locked memory, whence it is copied to a GPU beside other work."""
        return with_tensors(self, lambda x: x.pin_memory() if x.numel() else x)

    @property
    def attend(self) -> PackedAttention:
        """What its tokens see of each other, on its device."""
        return PackedAttention(self.layout, self.documents)


def draw_diffusion(
    tokens: NDArray[np.int64],
    valid: NDArray[np.bool_],
    rows: NDArray[np.int64],
    num_rows: int,
    config: ObjectiveConfig,
    *key: int | str,
) -> OrderedRows:
    """Noise of rows on the diffusion loss.

    tokens, valid: (B, L). rows: (B,) index among the `num_rows` diffusion rows of the global batch. key: (seed, step).
    Padding (valid false) is never masked and comes last in the order, where no other token sees it.
    """
    length = tokens.shape[1]
    raw = _row_words(2 * length, rows, *key, "diffusion")
    if config.diffusion_loss == "any_order":
        order, masked = _orders_by_diffusion(valid, raw, config.alpha_0)
        return OrderedRows(tokens, order, np.ones_like(valid), (masked & valid).astype(np.float64), rows)
    t = antithetic_times(rows, num_rows, config.time_epsilon, *key)
    clean = config.alpha_0 * (1 - (1 - config.time_epsilon) * t)
    masked = (uniforms(raw[:, length:]) >= clean[:, None]) & valid
    order = padding_last(clean_then_masked_random(masked, raw[:, :length]), valid)
    weight = np.ones_like(t)
    if config.diffusion_loss == "elbo":
        weight = elbo_weight(t, config.alpha_0, config.time_epsilon)
    return OrderedRows(tokens, order, masked, masked * weight[:, None], rows)


def draw_sequential(
    tokens: NDArray[np.int64],
    valid: NDArray[np.bool_],
    rows: NDArray[np.int64],
    alpha_0: float,
    capacity: int,
    *key: int | str,
) -> OrderedRows:
    """Noise of rows on the sequential loss; a row with more masks than `capacity` holds is drawn again.

    Raises:
        ValueError: padding leaves no room in the mask stream; give it the capacity of a whole row.
    """
    length = tokens.shape[1]
    padding = length - valid.sum(1)
    if capacity < length and padding.any():
        raise ValueError(
            f"row {rows[padding.argmax()]} has {padding.max()} padding tokens, which a mask stream of capacity {capacity} "
            f"cannot hold; use capacity = seq_length = {length}"
        )
    raw = _row_words(2 * length, rows, *key, "sequential")
    masked = (uniforms(raw[:, length:]) >= alpha_0) & valid
    attempt = 0
    while (over := np.flatnonzero(masked.sum(1) > capacity)).size:
        attempt += 1
        again = _row_words(length, rows[over], *key, "sequential again", attempt)
        masked[over] = (uniforms(again) >= alpha_0) & valid[over]
    order = padding_last(clean_random_then_left_to_right(masked, raw[:, :length]), valid)
    return OrderedRows(tokens, order, masked, masked.astype(np.float64), rows)


def draw_orders(
    valid: NDArray[np.bool_], rows: NDArray[np.int64], alpha_0: float, *key: int | str
) -> NDArray[np.int64]:
    """Orders as the model generates: n ~ Binomial(L, alpha_0) random places, then the rest left to right; padding last."""
    return _orders_by_diffusion(valid, _row_words(2 * valid.shape[1], rows, *key, "order"), alpha_0)[0]


def _orders_by_diffusion(
    valid: NDArray[np.bool_], raw: NDArray[np.uint64], alpha_0: float
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    length = valid.shape[1]
    by_diffusion = uniforms(raw[:, length:]) < alpha_0
    order = clean_random_then_left_to_right(~by_diffusion, raw[:, :length])
    return padding_last(order, valid), by_diffusion


def _row_words(count: int, rows: NDArray[np.int64], *key: int | str) -> NDArray[np.uint64]:
    return np.stack([words(count, *key, int(row)) for row in rows])


def padding_last(order: NDArray[np.int64], valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The same order with padding moved to its end."""
    if valid.all():
        return order
    in_order = np.take_along_axis(valid, order, axis=1)
    return np.take_along_axis(order, np.argsort(~in_order, axis=1, kind="stable"), axis=1)


def pack(
    plain: OrderedRows | None, groups: list[tuple[OrderedRows, int, int]], mask_id: int, *key: int | str
) -> PackedBatch:
    """Rows laid out as one micro-batch. All of them have documents, or none.

    plain: rows fed once, masks in place (diffusion). groups: (rows, capacity, part) fed as two streams.
    key: (seed, step), for the dropout ids.

    Raises:
        ValueError: a token that carries loss is not among the last `capacity` places of its order.
    """
    everyone = ([plain] if plain is not None else []) + [rows for rows, _, _ in groups]
    length = everyone[0].tokens.shape[1]
    num_plain = 0 if plain is None else len(plain.tokens)
    layout = PackedLayout(length, num_plain, tuple((len(rows.tokens), capacity) for rows, capacity, _ in groups))
    pieces = _Pieces(length)
    if plain is not None:
        pieces.add_loss(plain, 0, DIFFUSION, 0)
        pieces.add_stream(plain, np.where(plain.masked, mask_id, plain.tokens), 0, 0)
    for rows, _, _ in groups:
        pieces.add_stream(rows, rows.tokens, 0, 1)
    first_row = num_plain
    for rows, capacity, part in groups:
        early = np.take_along_axis(rows.weights, rows.order, 1)[:, : length - capacity]
        if early.any():
            bad = int(rows.rows[early.any(1).argmax()])
            raise ValueError(f"row {bad}: a token with loss lies before the last {capacity} places of its order")
        pieces.add_loss(rows, length - capacity, part, first_row)
        pieces.add_stream(rows, np.full_like(rows.tokens, mask_id), length - capacity, 2)
        first_row += len(rows.tokens)
    return pieces.batch(layout, *key)


class _Pieces:
    """Collects the streams of a micro-batch in the order of its tokens."""

    def __init__(self, length: int):
        self.length, self.count = length, 0
        self.tokens: list[NDArray[np.int64]] = []
        self.positions: list[NDArray[np.int64]] = []
        self.ids: list[NDArray[np.int64]] = []
        self.loss: list[tuple[NDArray[np.int64], ...]] = []
        self.weights: list[NDArray[np.float64]] = []
        self.sizes: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = [], []  # of runs: causal rows, masks
        self.by_document = False

    def add_stream(self, rows: OrderedRows, fed: NDArray[np.int64], first_place: int, stream: int) -> None:
        """Feed the places from `first_place` on of each row's order."""
        order = rows.stream(first_place)
        self.tokens.append(np.take_along_axis(fed, order, 1).ravel())
        self.positions.append(order.ravel())
        self.ids.append(((rows.rows[:, None] * 3 + stream) * self.length + order).ravel())
        self.count += order.size
        self.by_document = rows.documents is not None
        sizes = rows.document_sizes(first_place) if self.by_document else np.full((len(order), 1), order.shape[1])
        self.sizes[stream == 2].append(sizes)

    def add_loss(self, rows: OrderedRows, first_place: int, part: int, first_row: int) -> None:
        """Say which of the places that the next `add_stream` feeds carry loss."""
        order = rows.stream(first_place)
        weights = np.take_along_axis(rows.weights, order, 1)
        where = np.flatnonzero(weights)
        row = where // order.shape[1]
        targets = np.take_along_axis(rows.tokens, order, 1).ravel()[where]
        self.loss.append((self.count + where, targets, np.full_like(where, part), first_row + row))
        self.weights.append(weights.ravel()[where])

    def batch(self, layout: PackedLayout, *key: int | str) -> PackedBatch:
        """The whole micro-batch as tensors."""
        places, targets, parts, sources = (torch.from_numpy(np.concatenate(x)) for x in zip(*self.loss, strict=True))
        salt = int(words(1, *key, "dropout")[0] & np.uint64(0x7FFFFFFF))
        ids = (np.concatenate(self.ids) * 2654435761 + salt) & 0x7FFFFFFF
        assert self.count == layout.num_tokens
        return PackedBatch(
            layout=layout,
            tokens=torch.from_numpy(np.concatenate(self.tokens)),
            positions=torch.from_numpy(np.concatenate(self.positions)),
            places=places,
            targets=targets,
            weights=torch.from_numpy(np.concatenate(self.weights)),
            parts=parts,
            sources=sources,
            dropout_ids=torch.from_numpy(ids.astype(np.int32)),
            last=LastBlock.of(layout, np.sort(places.numpy()), *self.sizes),
            documents=DocumentRuns.of(*self.sizes) if self.by_document else None,
        )


@dataclass(frozen=True)
class Noised:
    """A rank's share of one step.

    micro_batches: all of the same layout. num_valid: (2,) fp64, this rank's valid tokens in the rows of each part.
    """

    micro_batches: list[PackedBatch]
    num_valid: Tensor


def draw_step(
    tokens: NDArray[np.int64],
    valid: NDArray[np.bool_],
    rows: NDArray[np.int64],
    config: ObjectiveConfig,
    *,
    mask_id: int,
    global_batch_size: int,
    num_micro_batches: int,
    capacity: int,
    key: _Key,
    documents: NDArray[np.int64] | None = None,
) -> Noised:
    """A rank's rows of a global batch, noised and packed.

    tokens, valid: (B, L). rows: (B,) ascending global rows; those below global_batch_size x diffusion fraction are the
    diffusion part. key: (seed, step). documents: (B, L) from `document_numbers`, where attention stays inside documents;
    the noise is the same with and without.

    Raises:
        ValueError: the rows of either part do not divide into the micro-batches.
    """
    num_diffusion = round(global_batch_size * config.fraction)
    first = slice(None, int((rows < num_diffusion).sum()))
    rest = slice(first.stop, None)
    for name, count in (("diffusion", first.stop), ("sequential", len(rows) - first.stop)):
        if count % num_micro_batches:
            raise ValueError(f"{count} {name} rows do not divide into {num_micro_batches} micro-batches")
    data = tokens, valid, rows, documents
    diffusion, sequential = _draw_parts(data, (first, rest), num_diffusion, config, capacity, key)
    batches = [
        _pack_parts(_share(diffusion, i, num_micro_batches), _share(sequential, i, num_micro_batches), config, capacity,
                    mask_id, key)
        for i in range(num_micro_batches)
    ]  # fmt: skip
    counts = [float(valid[first].sum()), float(valid[rest].sum())]
    return Noised(batches, torch.tensor(counts, dtype=torch.float64))


def micro_batch_layout(config: Config, capacity: int) -> PackedLayout:
    """The layout of every micro-batch of a run that `draw_step` makes with this capacity."""
    o, rows, length = config.objective, config.train.micro_batch_size, config.model.seq_length
    diffusion = round(rows * o.fraction)
    plain = 0 if o.diffusion_loss == "any_order" else diffusion
    groups = ((diffusion - plain, length), (rows - diffusion, capacity))
    return PackedLayout(length, plain, tuple(group for group in groups if group[0]))


def draw_validation(
    tokens: NDArray[np.int64],
    valid: NDArray[np.bool_],
    rows: NDArray[np.int64],
    num_rows: int,
    config: ObjectiveConfig,
    *,
    mask_id: int,
    key: _Key,
    documents: NDArray[np.int64] | None = None,
) -> Noised:
    """Every row in both parts of the bound (not one half of the rows in each, as the reference has it), as one batch."""
    exact = config.model_copy(update={"diffusion_loss": "elbo"})
    length, both, data = tokens.shape[1], valid.sum(), (tokens, valid, rows, documents)
    parts = slice(None if config.alpha_0 > 0 else 0), slice(None if config.alpha_0 < 1 else 0)
    diffusion, sequential = _draw_parts(data, parts, num_rows, exact, length, key)
    batch = _pack_parts(diffusion, sequential, exact, length, mask_id, key)
    counts = [float(both) if part is not None else 0.0 for part in (diffusion, sequential)]
    return Noised([batch], torch.tensor(counts, dtype=torch.float64))


def _draw_parts(
    data: _Rows, parts: tuple[slice, slice], num_diffusion: int, config: ObjectiveConfig, capacity: int, key: _Key
) -> tuple[OrderedRows | None, OrderedRows | None]:
    """The rows of each part with their noise; None for a part without rows."""

    def part(which: slice, draw: Callable[..., OrderedRows], *more: Any) -> OrderedRows | None:
        tokens, valid, rows, documents = (None if array is None else array[which] for array in data)
        return replace(draw(tokens, valid, rows, *more, *key), documents=documents) if len(rows) else None  # type: ignore[arg-type]

    first, rest = parts
    return part(first, draw_diffusion, num_diffusion, config), part(rest, draw_sequential, config.alpha_0, capacity)


def _share(rows: OrderedRows | None, index: int, count: int) -> OrderedRows | None:
    if rows is None:
        return None
    size = len(rows.rows) // count
    return rows[index * size : (index + 1) * size]


def _pack_parts(
    diffusion: OrderedRows | None,
    sequential: OrderedRows | None,
    config: ObjectiveConfig,
    capacity: int,
    mask_id: int,
    key: _Key,
) -> PackedBatch:
    groups = []
    plain = diffusion
    if diffusion is not None and config.diffusion_loss == "any_order":
        plain = None
        groups.append((diffusion, diffusion.tokens.shape[1], DIFFUSION))
    if sequential is not None:
        groups.append((sequential, capacity, SEQUENTIAL))
    return pack(plain, groups, mask_id, *key)


def part_sums(losses: Tensor, batch: PackedBatch) -> Tensor:
    """Weighted sums of the (M,) token losses over each part of the loss: (2,), fp32 or better."""
    weighted = losses * batch.weights.to(losses.dtype)
    return weighted.new_zeros(2).index_add(0, batch.parts, weighted)


def token_counts(batch: PackedBatch, num_valid: Tensor) -> Tensor:
    """What each (M,) token loss counts in `mean_loss` of `part_sums`."""
    return batch.weights / num_valid.clamp(min=1).to(batch.weights).index_select(0, batch.parts)


def mean_loss(sums: Tensor, num_valid: Tensor) -> Tensor:
    """The NELBO per token: each part's sum over the valid tokens, masked or not, of that part's rows."""
    return (sums / num_valid.clamp(min=1).to(sums)).sum()
